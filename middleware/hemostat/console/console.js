// Shows what /api/v1/status and /api/v1/profiles say; text only, so that nothing they carry can become markup.
"use strict";

const number = (x, digits = 4) => (x === null || x === undefined ? "–" : Number(x).toFixed(digits));
const percent = (x) => (x === null || x === undefined ? "–" : (100 * x).toFixed(1) + " %");
const interval = (e, show = number) => (e && e.ci95 && e.ci95[0] !== null ? `${show(e.ci95[0])} … ${show(e.ci95[1])}` : "–");
const counts = (o) => Object.entries(o || {}).map(([k, v]) => `${k} ${v}`).join(", ") || "none";
const evidence = (e, bound) => `${e.version}: ${e.requests} held-out requests, mean gain ${number(e.mean_gain)} nats, ${bound}`;

function fill(id, header, rows) {
  const table = document.getElementById(id);
  table.replaceChildren();
  for (const [cells, tag] of [[header, "th"], ...rows.map((r) => [r, "td"])]) {
    if (!cells) continue;
    const tr = table.insertRow();
    cells.forEach((text, i) => {
      const cell = document.createElement(tag === "th" || (i === 0 && !header) ? "th" : "td");
      cell.textContent = text;
      tr.append(cell);
    });
  }
}

async function refresh() {
  const state = document.getElementById("state");
  try {
    const [status, profiles] = await Promise.all(
      ["api/v1/status", "api/v1/profiles"].map((u) => fetch(u).then((r) => (r.ok ? r.json() : Promise.reject(r.status)))));
    const r = status.requests;
    state.textContent = `reference: ${status.reference.state} ${status.reference.detail || ""} · calibration: ${status.profile.mode}`
      + ` · engines: ${status.engines.live}`;
    state.className = status.reference.state === "ready" ? "good" : "bad";
    document.getElementById("divergence-note").textContent =
      `${r.scored} requests, ${status.tokens_scored} tokens; KL is a ${status.raw.kl_nats.bound} bound from the top ${status.top_k} ids`
      + ` unless it says otherwise; intervals (95 %) count requests, not tokens.`;
    fill("divergence", ["", "KL(reference‖compressed), nats/token", "95 %", "total variation", "same top-1", "covered mass"],
      [["raw", status.raw], ...(status.calibrated.raw_same_requests ? [["raw, same requests", status.calibrated.raw_same_requests]] : []),
        ["calibrated", status.calibrated]].map(([stage, s]) => {
        return [stage, number(s.kl_nats.estimate), interval(s.kl_nats), number(s.total_variation, 3), percent(s.top1_agreement), percent(s.covered_mass)];
      }));
    const c = status.calibration;
    fill("calibration", null, [
      ["mode", status.profile.mode], ["serves", `${status.profile.version} (${status.profile.family})`],
      ["selected", c.selected ? evidence(c.selected, `below ${number(c.selected.upper)} for sure`) : "none"],
      ...c.candidates.map((e) => ["candidate", evidence(e, `above ${number(e.lower)} for sure`)]),
      ["learned from", `${c.learned_requests} requests, ${c.learned_tokens} tokens`],
    ]);
    fill("shadow", null, [
      ["queue", `${status.queue.depth} waiting, lag ${number(status.queue.lag_seconds, 1)} s`],
      ["shadowed / scored", `${r.shadowed} / ${r.scored}`], ["skipped", counts(r.skipped)], ["dropped", counts(r.dropped)],
    ]);
    fill("events", ["when", "decision", "profile", "why"],
      profiles.events.map((e) => [new Date(1000 * e.at).toLocaleString(), e.decision, e.version, e.why]));
  } catch (error) {
    state.textContent = `no answer from the admin port (${error})`;
    state.className = "bad";
  }
}

refresh();
setInterval(refresh, 2000);
