// The cost of each stage, from the manifests.

function costView(overview) {
  const { costs } = overview;
  if (!costs.length) return h("div", { class: "page" }, hiddenTitle("Cost"), h("p", { class: "empty" }, prose(overview.empty.cost)));
  const longest = Math.max(...costs.map((cost) => cost.seconds));
  const total = (key) => costs.reduce((sum, cost) => sum + (cost[key] || 0), 0);
  const rows = [...costs, { stage: "all stages", seconds: total("seconds"), sampled_tokens: total("sampled_tokens"), trained_tokens: total("trained_tokens"), gpus: Math.max(...costs.map((cost) => cost.gpus)), gpu_hours: total("gpu_hours"), sum: true }];
  return h("div", { class: "page" }, hiddenTitle("Cost"),
    h("div", { class: "tiles" },
      tile("Wall-clock", duration(total("seconds")), plural(costs.length, "stage")),
      tile("GPU-hours", number(total("gpu_hours"), total("gpu_hours") ? 2 : 0), total("gpu_hours") ? "GPUs times wall-clock" : "0 GPUs: everything ran on CPU"),
      tile("Sampled tokens", many(total("sampled_tokens")), "written by the policy"),
      tile("Trained tokens", many(total("trained_tokens")), "that entered a loss")),
    card("Cost by kind of work", "Over all rounds.", table([
      ["work", (kind) => kind.name], ["wall-clock", (kind) => meter(kind.seconds / total("seconds"), duration(kind.seconds)), "number"],
      ["share", (kind) => `${Math.round((100 * kind.seconds) / total("seconds"))}%`, "number"],
    ], byKind(costs), "Cost by kind of work")),
    card("Cost by stage", "From the manifests, in the order in which the stages ran. Sampled tokens: written by the policy. Trained tokens: entered a loss, counted each time. A dash: none, or not recorded.", table([
      ["stage", (cost) => cost.stage],
      ["wall-clock", (cost) => (cost.sum ? duration(cost.seconds) : meter(cost.seconds / longest, duration(cost.seconds))), "number"],
      ["sampled tokens", (cost) => many(cost.sampled_tokens), "number"], ["trained tokens", (cost) => many(cost.trained_tokens), "number"],
      ["GPUs", (cost) => (cost.gpus ? many(cost.gpus) : "0 (CPU)"), "number"], ["GPU-hours", (cost) => number(cost.gpu_hours, 2), "number"],
    ], rows, "Cost by stage")));
}

const KINDS = { grpo: "GRPO", pool: "pool", pairs: "pairs", lead: "teacher's lead", ofsd: "self-distillation", evaluation: "evaluation", index: "index", recall: "retrieval recall", coldstart: "cold start" };

function byKind(costs) {
  const seconds = {};
  for (const cost of costs) {
    const kind = cost.stage.split("-")[0];
    seconds[KINDS[kind] || kind] = (seconds[KINDS[kind] || kind] || 0) + cost.seconds;
  }
  return Object.entries(seconds).map(([name, value]) => ({ name, seconds: value })).sort((a, b) => b.seconds - a.seconds);
}
