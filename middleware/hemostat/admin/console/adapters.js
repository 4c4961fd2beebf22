// The part of the page about adapters; it uses the functions of console.js.
"use strict";

const bytes = (n) => !known(n) ? NONE : n >= 1e9 ? `${fixed(n / 1e9, 2)} GB` : n >= 1e6 ? `${fixed(n / 1e6, 1)} MB` : `${fixed(n / 1e3, 1)} kB`;

/** Of an entry of the list of profiles. */
function sizeOf(profile) {
  const a = profile.adapter;
  return a ? `rank ${whole(a.rank)}, ${bytes(a.bytes)}${a.map ? ", and a map of the logits" : ""}` : bytes(profile.bytes);
}

/** A cell: a bar from 0 to 1 beside its value. */
function barCell(share) {
  const made = document.createElement("span");
  made.className = "bar-cell";
  made.append(part(Math.max(0, share), false), percent(share));
  return made;
}

/** One line: why no adapter serves, or how many may be asked for. */
function lead(a) {
  const engine = a.engine;
  if (a.state === "off") return [`Adapters are off${a.detail ? `: ${a.detail}` : ""}.`, "lead"];
  if (engine.state === "unusable") return [`No request asks for an adapter: ${engine.detail}.`, "lead bad-text"];
  if (a.state === "unavailable") return [`No adapter can be made: ${a.detail}.`, "lead bad-text"];
  if (engine.ready.length) return [`${plural(engine.ready.length, "adapter")} may be asked for: ${engine.ready.map(brief).join(", ")}.`, "lead good-text"];
  if (engine.wanted.length) return [`No request asks for an adapter yet: the engine is ${engine.state}${engine.detail ? ` (${engine.detail})` : ""}.`, "lead wait-text"];
  return ["No adapter is tested or serves.", "lead"];
}

function lastBuild(built) {
  const held = (built && built.held_out) || {}, made = built && built.version;
  const ends = [held.share_low, held.share_high];
  say("adapter-won", percent(held.share));
  bar("adapter-won-bar", ends, held.share, Math.min(0, held.share_low ?? 0), 1);
  say("adapter-won-sub", !built ? "none was made yet" : !made ? `the last build failed (${built.outcome}): ${built.detail}` : `${brief(made)}; `
    + (known(held.share) ? `95 % ${range(ends, percent)}, KL ${nats(held.kl_before)} to ${nats(held.kl_after)} nats on ${plural(held.tokens, "token")}` : "nothing was held out"));
  const of = (share) => known(share) ? ` (${percent(share)} of the compressed layers)` : "", rank = made && (built.max_rank ?? built.rank);
  say("adapter-rank", made ? `rank ${whole(rank)}` : NONE);
  say("adapter-size", !made ? "" : `${bytes(built.bytes)} stored${of(built.bytes_share)}`
    + (known(built.engine_bytes) ? `, ${bytes(built.engine_bytes)} in the engine${of(built.engine_bytes_share)}` : "") + (built.shared_out ? `; ranks shared out, ${whole(built.rank)} on average by bytes` : ""));
}

function won(built) {
  const layers = (built && built.layers) || {}, types = Object.entries((built && built.kinds) || {});
  table("adapter-types", "What is won, by type of layer", ["type", "layers", "rank, mean", "won"], types.map(([name, k]) => [name, whole(k.layers), fixed(k.rank, 1), known(k.won) ? barCell(k.won) : NONE]),
    "no adapter was made yet");
  const depths = new Map();
  Object.entries(layers).forEach(([name, layer]) => {
    const depth = (name.match(/\.(\d+)\./) || [])[1];
    if (depth !== undefined && known(layer.won)) depths.set(depth, [...(depths.get(depth) || []), layer.won]);
  });
  table("adapter-depths", "What is won, by depth", ["decoder layer", "won, mean of its layers"],
    [...depths].sort(([a], [b]) => a - b).map(([depth, all]) => [depth, barCell(all.reduce((sum, x) => sum + x, 0) / all.length)]), "no adapter was made yet");
}

function treatedToControl(s) {
  const read = (figure) => ["treated", "control"].map((arm) => s.arms[arm] && figure(s.arms[arm])), kl = read((f) => f.kl_nats_estimate.estimate);
  // The estimate exists for texts that were sampled at temperature 1 only.
  const inKl = kl.every(known), [treated, control] = inKl ? kl : read((f) => f.total_variation), both = known(treated) && control > 0;
  const one = (arm, x) => `${arm} ${nats(x)} (${plural(s.arms[arm].requests, "request")})`;
  say("adapter-arms", both ? `×${fixed(treated / control, 2)}` : NONE);
  say("adapter-arms-unit", inKl ? "KL, nats, estimate" : "total variation, lower bounds");
  say("adapter-arms-sub", both ? `${one("treated", treated)}, ${one("control", control)}` : "not in both arms yet");
}

function adapters(s) {
  const a = s.adapter, engine = a.engine, judge = a.judge, built = a.last_build;
  say("adapter-lead", ...lead(a));
  $("adapter-room").hidden = a.state === "off";
  lastBuild(built);
  won(built);
  const building = a.state === "building" || a.state === "down";
  say("adapter-tokens", whole(a.known_tokens));
  $("adapter-tokens-bar").replaceChildren(part(a.next_tokens ? a.known_tokens / a.next_tokens : 0, false));
  say("adapter-tokens-sub", building ? `${a.state}: ${a.detail || "starting"}` : `of ${whole(a.next_tokens)} for the next adapter; the newest ${whole(a.tokens)} are kept, of ${plural(a.texts, "text")}`);
  say("adapter-engine", `${whole(engine.ready.length)} of ${whole(engine.wanted.length)} ready`, engine.state === "unusable" ? "big bad-text" : "big");
  say("adapter-engine-sub", `${engine.state}; ${whole(engine.loaded.length)} loaded${known(engine.capacity) ? `, room for ${whole(engine.capacity)}` : ""}${engine.way ? `; by ${engine.way}` : ""}`);
  treatedToControl(s);
  table("adapter-probes", "Probes of the engine", ["probe", "passed", "failed", "no answer", "waits for the copy", "last result"], Object.entries(engine.probes).map(([name, p]) => [
    name, whole(p.passed), p.failed ? coloured(whole(p.failed), "bad-text") : "0", whole(p.error), whole(p.waiting), p.detail || "not probed yet"]));
  table("adapter-detail", "In detail", null, [
    ["last build", built && built.version ? `${brief(built.version)} from ${plural(built.tokens, "token")} in ${lasted(built.wall_seconds)}; ${built.method || "method not known"}; ${built.outcome}${built.detail ? `: ${built.detail}` : ""}`
      : built ? `${built.outcome}: ${built.detail}` : "none"],
    ["builds by outcome", `${counts(a.builds)}; ${plural(a.restarts, "restart")} of the process`],
    ["not used", Object.entries(engine.failures).map(([version, why]) => `${brief(version)}: ${why}`).join("; ") || "none"],
    ["copies that judge", `${judge.state}${judge.detail ? `: ${judge.detail}` : ""}; ${bytes(judge.bytes)}; ${plural(judge.judged, "request")} judged, ${plural(judge.waiting, "request")} waiting, dropped: ${counts(judge.dropped)}`],
  ]);
}
