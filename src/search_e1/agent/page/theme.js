// Applies the chosen theme, by default the system's, before the first paint.
(() => {
  const NAME = "search-e1-theme";
  const root = document.documentElement;
  try { // storage may be denied
    const chosen = localStorage.getItem(NAME);
    if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  } catch { /* the choice is not kept */ }
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
      root.dataset.theme = now === "dark" ? "light" : "dark";
      try {
        localStorage.setItem(NAME, root.dataset.theme);
      } catch { /* kept until the page is left */ }
    });
  });
})();
