// Profiles: which there are, what they have shown, what adapters correct.
import { brief, briefly, bytes, counts, fixed, known, lasted, nats, NONE, percent, plural, range, total, when, whole } from "./format.js";
import { Action, ask, Bar, Coloured, Explain, Facts, html, Link, Section, Table, Version } from "./parts.js";
import { EventTable } from "./events.js";

export const MODES = {
  off: "Calibration and learning stop at once.",
  observe: "Profiles are learned and judged; no request is changed.",
  auto: "Profiles that are proven on held-out requests are served.",
};

const partOf = (s, version) => {
  const all = s.calibration.kinds, own = all.filter((k) => k.version === version);
  return own.length ? `${own.length} of ${plural(all.length, "kind")}, ${percent(own.reduce((sum, k) => sum + (k.share || 0), 0), 0)} of the traffic` : "none";
};

const sizeOf = (f) => (f.adapter ? `rank ${whole(f.adapter.rank)}, ${bytes(f.adapter.bytes)}` : bytes(f.bytes));

/** A mean gain of a test. Adapters are judged by total variation, whose gain has no unit; the gain in KL stands beside it. */
export function proof(e) {
  if (!e || !e.units || !known(e.mean_gain)) return NONE;
  const tv = e.figure === "total_variation", byToken = known(e.mean_gain_by_token) ? `, ${nats(e.mean_gain_by_token)} by token` : "";
  return `${plural(e.units, "held-out conversation")}, mean gain ${tv ? "of the total variation " : ""}${nats(e.mean_gain)}${tv ? "" : " nats"} by request${byToken}${known(e.mean_kl_gain) ? `; of the KL ${nats(e.mean_kl_gain)} nats by request` : ""}`;
}

/** Tests of a version: [kind, evidence]. */
const testsOf = (s, version) => s.calibration.kinds.flatMap((k) => [...(k.version === version && k.watch ? [[k.kind, { ...k.watch, summary: k.summary, serves: true }]] : []),
  ...k.candidates.filter((c) => c.version === version).map((c) => [k.kind, c])]);

function Switch({ s, p }) {
  return html`<div class="controls"><span>Calibration is <strong id="mode">${s.profile.mode}</strong></span>
    <span class="group" role="group" aria-label="Switch calibration">${Object.entries(MODES).map(([mode, text]) => html`<button type="button" aria-pressed=${String(mode === s.profile.mode)}
      onClick=${() => ask(`Set calibration to ${mode}?`, text, "api/v1/calibration", { mode })}>${mode}</button>`)}</span>
    <${Action} label="Roll back all kinds to identity" asks=${["Roll back?", "No profile (identity) serves any kind until one is promoted there.", "api/v1/profiles/rollback", {}]}>Roll back all kinds to identity<//>
    ${p.pinned && html`<${Action} label="Unpin" asks=${["Unpin?", "The profile continues to serve, and is judged again.", "api/v1/profiles/pin", { version: null }]}>Unpin<//>`}</div>`;
}

export function Profiles({ s, p }) {
  const won = s.recovered, arms = Object.entries(s.endings);
  return html`<${Section} title="Profiles"><${Switch} s=${s} p=${p} />
    <${Table} caption="Versions, newest first" rows=${p.profiles.filter((f) => f.state !== "probe")} empty="none yet: identity serves" columns=${[
      ["version", (f) => html`<${Version} of=${f.version} />`, (f) => f.version], ["family", (f) => f.family, (f) => f.family],
      ["state", (f) => (f.kinds.length ? `${f.state} for ${plural(f.kinds.length, "kind")}` : f.state), (f) => f.state],
      ["serves", (f) => partOf(s, f.version)], ["size", sizeOf, (f) => f.adapter?.bytes ?? f.bytes], ["made", (f) => when(f.created), (f) => f.created],
      ["evidence", (f) => { const [[kind, e] = []] = testsOf(s, f.version).sort(([, a], [, b]) => b.units - a.units); return e?.units ? `${kind}: ${proof(e)}` : NONE; }]]} />
    <${Facts} of=${[
      ["recovered part of the KL", known(won.ratio) ? `${percent(won.ratio)}, 95 % ${range(won.ci95, percent, won.no_interval)}, by ${brief(s.profile.version)}` : "no profile has been measured on held-out conversations"],
      ["learned from", `${plural(s.learner.tokens, "token")}; learner ${s.learner.state}${s.learner.detail ? `: ${s.learner.detail}` : ""}`]]} />
    <${Table} caption="How answers end, all traffic, by arm" rows=${arms} columns=${[
      ["arm", ([arm]) => arm], ["answers", ([, e]) => whole(total(e.finished))], ["cut at the length limit", ([, e]) => percent((e.finished.length || 0) / total(e.finished))],
      ["tokens per answer", ([, e]) => fixed(e.output_tokens / total(e.finished), 1)], ["repetition loops", ([, e]) => whole(e.loops)],
      ["JSON and tool calls", ([, e]) => Object.entries(e.structured).map(([kind, by]) => `${kind}: ${counts(by)}`).join("; ") || "none"]]} />
    <${Explain} asks="On what evidence does a profile serve?" not="that a candidate with a positive mean gain helps; its evidence decides.">Each kind has its own test on held-out conversations, valid at every look and without any one
      client. A model can be closer to its reference and still repeat itself: that is why the endings of answers are here.<//><//>
    <${Adapters} s=${s} />`;
}

export function Profile({ s, p, name }) {
  const f = p.profiles.find((x) => x.version.startsWith(name));
  if (!f) return html`<${Section} title="Profile ${name}" id="profile"><p>No such profile is held. <${Link} to="profiles">All profiles<//></p><//>`;
  const v = f.version.slice(0, 8), built = s.adapter.last_build;
  return html`<${Section} title="Profile ${v}" id="profile"><div class="controls">
      ${f.kinds.length < s.calibration.kinds.length && html`<${Action} label="Promote ${v}" asks=${["Promote this profile?", `${v} serves all kinds without statistical proof, and is tested in each like any other profile.`, "api/v1/profiles/promote", { version: f.version }]}>Promote in all kinds<//>`}
      ${!(p.pinned && f.state === "selected") && html`<${Action} label="Pin ${v}" asks=${["Pin this profile?", `${v} serves all requests, whatever is measured, until it is unpinned.`, "api/v1/profiles/pin", { version: f.version }]}>Pin<//>`}</div>
    <${Facts} of=${[["version", html`<code>${f.version}</code>`], ["family", f.family], ["state", f.state], ["serves", partOf(s, f.version)], ["size", sizeOf(f)], ["made", when(f.created)],
      ["held by engines", s.engines.acknowledged.includes(f.version) ? "by every engine" : "not by every engine"]]} />
    <${Table} caption="Evidence by kind" rows=${testsOf(s, f.version)} empty="no test of this version" columns=${[
      ["kind", ([kind]) => html`<${Link} to=${["kinds", kind]}>${kind}<//>`, ([kind]) => kind], ["role", ([, e]) => (e.serves ? "serves" : "candidate")],
      ["evidence", ([, e]) => percent(e.progress, 0), ([, e]) => e.progress], ["gain", ([, e]) => proof(e), ([, e]) => e.mean_gain], ["in words", ([, e]) => briefly(e.summary)]]} />
    ${built?.version === f.version && html`<${Layers} built=${built} />`}
    <${EventTable} caption="Decisions" events=${p.events.filter((e) => e.version === f.version)} /><//>`;
}

// --- adapters -------------------------------------------------------------------------------------------------------------

/** Why no adapter serves, or how many requests can use. */
function lead(a) {
  const engine = a.engine;
  if (a.state === "off") return `Adapters are off${a.detail ? `: ${a.detail}` : ""}.`;
  if (engine.state === "unusable") return html`<${Coloured} as="bad">No request uses an adapter: ${engine.detail}.<//>`;
  if (a.state === "unavailable") return html`<${Coloured} as="bad">No adapter can be made: ${a.detail}.<//>`;
  if (engine.ready.length) return html`<${Coloured} as="good">${plural(engine.ready.length, "adapter")} can be used by requests: ${engine.ready.map(brief).join(", ")}.<//>`;
  if (engine.wanted.length) return html`<${Coloured} as="wait">No request uses an adapter yet: the engine is ${engine.state}${engine.detail ? ` (${engine.detail})` : ""}.<//>`;
  return "No adapter is tested or serves.";
}

function lastBuild(built) {
  if (!built) return "none was made yet";
  if (!built.version) return `the last build failed (${built.outcome}): ${built.detail}`;
  const held = built.held_out || {};
  return `${brief(built.version)} from ${plural(built.tokens, "token")} in ${lasted(built.wall_seconds)}; ${built.method || "method not known"}; ${known(held.share)
    ? `recovers ${percent(held.share)} of the KL, 95 % ${range([held.share_low, held.share_high], percent)}, KL ${nats(held.kl_before)} to ${nats(held.kl_after)} nats on ${plural(held.tokens, "token")}` : "nothing was held out"}`;
}

function sizes(built) {
  if (!built?.version) return NONE;
  const of = (share) => (known(share) ? ` (${percent(share)} of the compressed layers)` : "");
  return `rank ${whole(built.max_rank ?? built.rank)}; ${bytes(built.bytes)} stored${of(built.bytes_share)}${known(built.engine_bytes) ? `, ${bytes(built.engine_bytes)} in the engine${of(built.engine_bytes_share)}` : ""}${built.shared_out ? `; ranks shared out, ${whole(built.rank)} on average by bytes` : ""}`;
}

function Adapters({ s }) {
  const a = s.adapter, engine = a.engine, judge = a.judge, built = a.last_build, building = a.state === "building" || a.state === "down";
  if (a.state === "off") return html`<${Section} title="Adapters" level="h2"><p>${lead(a)}</p><//>`;
  return html`<${Section} title="Adapters" level="h2"><p class="lead">${lead(a)}</p><${Facts} of=${[
    ["last build", lastBuild(built)], ["size", sizes(built)],
    ["texts", building ? `${a.state}: ${a.detail || "starting"}` : `${whole(a.known_tokens)} of ${whole(a.next_tokens)} tokens for the next adapter; the newest ${whole(a.tokens)} are kept in memory, of ${plural(a.texts, "text")}`],
    ["at the engine", `${whole(engine.ready.length)} of ${whole(engine.wanted.length)} ready; ${engine.state}; ${whole(engine.loaded.length)} loaded${known(engine.capacity) ? `, room for ${whole(engine.capacity)}` : ""}${engine.way ? `; by ${engine.way}` : ""}`],
    ["builds by outcome", `${counts(a.builds)}; ${plural(a.restarts, "restart")} of the process`],
    ["not used", Object.entries(engine.failures).map(([version, why]) => `${brief(version)}: ${why}`).join("; ") || "none"],
    ["copies that judge", `${judge.state}${judge.detail ? `: ${judge.detail}` : ""}; ${bytes(judge.bytes)}; ${plural(judge.judged, "request")} judged, ${plural(judge.waiting, "request")} waiting, dropped: ${counts(judge.dropped)}`]]} />
    <${Table} caption="Probes of the engine" rows=${Object.entries(engine.probes)} columns=${[["probe", ([name]) => name], ["passed", ([, x]) => whole(x.passed)],
      ["failed", ([, x]) => (x.failed ? html`<${Coloured} as="bad">${whole(x.failed)}<//>` : "0")], ["no answer", ([, x]) => whole(x.error)], ["waits for the copy", ([, x]) => whole(x.waiting)], ["last result", ([, x]) => briefly(x.detail) || "not probed yet"]]} />
    ${built?.version && html`<${Layers} built=${built} />`}
    <${Explain} asks="What is an adapter?" not="that it serves, or helps every compression: where the loss is in rounded activations (W8A8), little is recovered; nor that it is the best use of its bytes: where the checkpoint can be replaced, better compression (hemostat compress) recovers more.">A profile that corrects the error of the compressed weights by a product
      of two small matrices for each linear layer; vLLM serves it as LoRA, by request. Requests use it only at an engine that has it loaded, and where it passed both probes since the engine's last start.<//><//>`;
}

/** What a build recovered, by type of layer and by depth. */
function Layers({ built }) {
  const depths = new Map(), cell = (share) => (known(share) ? html`<span class="bar-cell"><${Bar} share=${share} />${percent(share)}</span>` : NONE);
  Object.entries(built.layers || {}).forEach(([name, layer]) => {
    const depth = (name.match(/\.(\d+)\./) || [])[1];
    if (depth !== undefined && known(layer.won)) depths.set(Number(depth), [...(depths.get(Number(depth)) || []), layer.won]);
  });
  const means = [...depths].map(([depth, all]) => [depth, all.reduce((sum, x) => sum + x, 0) / all.length]).sort(([a], [b]) => a - b);
  return html`<${Table} caption="Recovered, by type of layer" rows=${Object.entries(built.kinds || {})} columns=${[["type", ([name]) => name, ([name]) => name], ["layers", ([, k]) => whole(k.layers)],
      ["rank, mean", ([, k]) => fixed(k.rank, 1), ([, k]) => k.rank], ["recovered", ([, k]) => cell(k.won), ([, k]) => k.won]]} />
    <${Table} caption="Recovered, by depth" rows=${means} columns=${[["decoder layer", ([depth]) => whole(depth), ([depth]) => depth], ["recovered, mean of its layers", ([, x]) => cell(x), ([, x]) => x]]} />
    <${Explain} asks="What does “recovered” of a layer say?" not="the same part of the KL; errors of some layers matter more than others’.">The part of its output's error that the correction removes, on the texts that it was made from.<//>`;
}
