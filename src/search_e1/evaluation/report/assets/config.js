// How to repeat the run: its config and the commands.

function configView(overview) {
  const { repeat } = overview;
  if (!repeat) return h("div", { class: "page" }, hiddenTitle("Config"), h("p", { class: "empty" }, prose("No config: the run directory holds no config.json. `search-e1 train` writes it when a run begins.")));
  return h("div", { class: "page" }, hiddenTitle("Config"),
    card("Repeat this run", `Save the config below as ${line(repeat.file)}, then train, compare and report. With the same versions on the same kind of machine the results are the same.`,
      copyable("commands", repeat.commands), versions(overview)),
    card("Config", "Every key that affects results.", copyable("config", repeat.toml)));
}
