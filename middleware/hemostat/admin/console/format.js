// How figures, times and versions are written.

export const NONE = "–";
export const known = (x) => x !== null && x !== undefined && Number.isFinite(x);
export const fixed = (x, digits) => (known(x) ? x.toFixed(digits).replace("-", "−") : NONE);
export const percent = (x, digits = 1) => (known(x) ? `${fixed(100 * x, digits)} %` : NONE);
export const whole = (x) => (known(x) ? x.toLocaleString("en-US", { maximumFractionDigits: 0 }) : NONE);
export const plural = (n, unit) => `${whole(n)} ${unit}${n === 1 ? "" : "s"}`;
export const total = (o) => Object.values(o || {}).reduce((a, b) => a + b, 0);
export const counts = (o) => Object.entries(o || {}).filter(([, n]) => n).sort((a, b) => b[1] - a[1]).map(([k, n]) => `${k} ${whole(n)}`).join(", ") || "none";
export const ms = (seconds) => (known(seconds) ? `${fixed(1000 * seconds, 2)} ms` : NONE);
export const bytes = (n) => !known(n) ? NONE : n >= 1e9 ? `${fixed(n / 1e9, 2)} GB` : n >= 1e6 ? `${fixed(n / 1e6, 1)} MB` : `${fixed(n / 1e3, 1)} kB`;

/** Three decimals; two significant digits below 0.01. */
export function nats(x) {
  if (!known(x) || x === 0 || Math.abs(x) >= 0.01) return fixed(x, 3);
  return Math.abs(x) < 1e-5 ? x.toExponential(1).replaceAll("-", "−") : fixed(x, 1 - Math.floor(Math.log10(Math.abs(x))));
}

export const UNKNOWN_INTERVAL = "interval not known yet";
/** Of an interval: its two ends, the one that is known, or that none is. why: the reason that the status gives (`no_interval`). */
export function range(ends, show = nats, why = null) {
  const [low, high] = ends ?? [];
  if (known(low) && known(high)) return `[${show(low)}, ${show(high)}]`;
  return known(low) ? `at least ${show(low)}` : known(high) ? `at most ${show(high)}` : why || UNKNOWN_INTERVAL;
}
/** Of a divergence; none where the interval is all that the figure can be, as after very few requests. */
export const endsOf = (figure) => (known(figure.ci95[1]) && figure.ci95[1] >= figure.cap ? [null, null] : figure.ci95);
// Its interval in words; of the hours seen where these are no whole cycle of the traffic yet.
export const interval = (figure) => {
  const seen = figure.ci95_seen ?? figure.ci95, ends = endsOf(figure), early = endsOf({ ...figure, ci95: seen });
  return known(ends[1]) || !known(early[1]) ? range(ends, nats, figure.no_interval) : `${range(early)} in the hours measured so far`;
};
/** Versions are 32 hex digits; 8 of them are shown, and accepted by the command line and the API. */
export const brief = (version) => (version && version.length === 32 ? version.slice(0, 8) : version || NONE);
export const briefly = (text) => String(text ?? "").replace(/\b[0-9a-f]{32}\b/g, (version) => version.slice(0, 8));

/** A share of the tokens in words, from its lower and upper bound: "About 4 of 10", "2 to 6 of 10". */
export function ofTokens(lower, upper) {
  if (!known(lower)) return null;
  const scale = [10, 100, 1000].find((n) => lower * n >= 0.95), top = [10, 100, 1000].find((n) => upper * n >= 0.95);
  if (!scale) return !known(upper) ? "At least 0 of 1,000" : top ? `At most ${Math.ceil(upper * top)} of ${whole(top)}` : "Fewer than 1 of 1,000";
  const [from, to] = [Math.round(lower * scale), Math.round(upper * scale)];
  if (!known(upper)) return `At least ${from} of ${whole(scale)}`;
  return from === to ? `About ${from} of ${whole(scale)}` : `${from} to ${to} of ${whole(scale)}`;
}

const two = (n) => String(n).padStart(2, "0");
export function when(t) {
  if (!known(t)) return NONE;
  const d = new Date(1000 * t), time = `${two(d.getHours())}:${two(d.getMinutes())}:${two(d.getSeconds())}`;
  return d.toDateString() === new Date().toDateString() ? time : `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())} ${time}`;
}

export function lasted(seconds) {
  if (!known(seconds)) return NONE;
  if (seconds < 120) return `${whole(Math.max(seconds, 0))} s`;
  if (seconds < 7200) return `${whole(seconds / 60)} min`;
  return seconds < 172800 ? `${whole(seconds / 3600)} h` : `${whole(seconds / 86400)} days`;
}

/** The name of the reference's checkpoint or model, if it is ready. */
export const named = (reference) => (reference.state === "ready" ? reference.detail.split("/").pop() : reference.detail) || NONE;

/** What measuring with the plugin alone means, and how clients opt out. */
export const pluginAlone = ({ needs_proxy: text, reads_headers: headers }) => (
  `${text[0].toUpperCase()}${text.slice(1)}. ${headers ? "X-Hemostat-Shadow: off" : "Only hemostat_shadow: off in vllm_xargs"} opts a request out.`);

/** Growth per second of a counter of the history; null where it decreased, because the process was restarted. */
export const perSecond = (past, name) => (past[name] || []).map((x, i, all) => (
  i && known(x) && known(all[i - 1]) && x >= all[i - 1] ? (x - all[i - 1]) / (past.time[i] - past.time[i - 1]) : null));
