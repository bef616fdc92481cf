// Applies the chosen theme before the first paint; until one is chosen, the system's is used.
(() => {
  const NAME = "search-e1-theme";
  const root = document.documentElement;
  try { // storage may be denied
    const chosen = localStorage.getItem(NAME);
    if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  } catch { /* not kept then */ }
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
      root.dataset.theme = now === "dark" ? "light" : "dark";
      try {
        localStorage.setItem(NAME, root.dataset.theme);
      } catch { /* holds until the page is left */ }
    });
  });
})();
