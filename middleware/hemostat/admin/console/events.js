// What has happened: decisions about profiles, alarms, and what the history noticed (problems, checkpoints, reloads).
import { brief, briefly, known, NONE, plural, when, whole } from "./format.js";
import { html, Link, Section, Table, Version } from "./parts.js";

const WORDS = {
  alarm: "alarm", promote: "promoted", roll_back: "rolled back", release: "released", pin: "pinned", unpin: "unpinned", mode: "mode", propose: "proposed", import: "imported",
  drop: "dropped", checkpoint: "models changed", reload: "reloaded", problem: "problem", solved: "solved",
};
const LETTERS = { alarm: "A", promote: "P", roll_back: "R", pin: "P", checkpoint: "C", reload: "L" };

const kindOf = (e) => e.kind || e.evidence?.kind || "";

/** Newest first. */
export function happened({ s, p, noticed }) {
  return [...p.events, ...s.alarm.events, ...noticed].sort((a, b) => b.at - a.at);
}

/** Those that a timeline marks, newest first. */
export const marks = (data) => happened(data).filter((e) => LETTERS[e.decision]).map((e) => ({
  ...e, letter: LETTERS[e.decision], bad: e.decision === "roll_back" || (e.decision === "alarm" && e.evidence.raised), text: described(e),
}));

const described = (e) => `${e.decision === "alarm" ? briefly(e.why) : `${WORDS[e.decision] || e.decision}${e.version ? ` ${brief(e.version)}` : ""}`}${e.kind ? ` in ${e.kind}` : ""}`;

/** Since when a version serves a kind, as far as the events go back. */
export const servedSince = (p, version, kind) => p.events.find((e) => ["promote", "pin"].includes(e.decision) && e.version === version && ["", kind].includes(e.kind))?.at;

function evidenceOf({ decision, evidence: e }) {
  if (decision === "alarm") return e.raised ? `${whole(e.on_tokens)} tokens of ${plural(e.on_requests, "request")}` : NONE;
  return e && known(e.units) ? `${plural(e.units, "held-out conversation")}` : NONE;
}

export const EventTable = ({ events, caption, fold = 20 }) => html`<${Table} caption=${caption} fold=${fold} rows=${events} columns=${[
  ["when", (e) => when(e.at), (e) => e.at],
  ["what", (e) => WORDS[e.decision] || e.decision, (e) => e.decision],
  ["kind", (e) => (kindOf(e) ? html`<${Link} to=${["kinds", kindOf(e)]}>${kindOf(e)}<//>` : NONE), kindOf],
  ["version", (e) => html`<${Version} of=${e.version} />`, (e) => e.version || ""],
  ["why", (e) => briefly(e.why)],
  ["evidence", evidenceOf],
]} empty="nothing has happened yet" />`;

export const Events = (data) => html`<${Section} title="Events">
  <p class="sub">Decisions about profiles and alarms are kept in the store; problems, changes of models and reloads since the start of this process only.</p>
  <${EventTable} caption="Newest first" events=${happened(data)} /><//>`;
