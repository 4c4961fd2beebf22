// The parts that pages are made of: tables, charts, bars, actions. Everything is written as text nodes.
import { Component, createRef, h } from "./vendor/preact.mjs";
import htm from "./vendor/htm.mjs";
import { fixed, known, NONE, when } from "./format.js";

export const html = htm.bind(h);

// --- links and actions ------------------------------------------------------------------------------------------------

/** The address of a page of the console: parts of its path, and what is chosen there. */
export const address = (path, chosen = {}) => {
  const query = new URLSearchParams(Object.entries(chosen).filter(([, value]) => value)).toString();
  return `#/${[].concat(path).map(encodeURIComponent).join("/")}${query ? `?${query}` : ""}`;
};
export const Link = ({ to, children }) => html`<a href=${address(to)}>${children}</a>`;
export const Version = ({ of, link = true }) => !of || of.length !== 32 ? html`<span>${of || NONE}</span>`
  : link ? html`<a href=${address(["profiles", of.slice(0, 8)])}><code>${of.slice(0, 8)}</code></a>` : html`<code>${of.slice(0, 8)}</code>`;

const asking = { listener: null };
/** Ask for confirmation and the admin token, then send `body` to `path`. */
export const ask = (title, text, path, body) => asking.listener?.({ title, text, path, body });
export const Action = ({ label, asks, children }) => html`<button type="button" aria-label=${label} onClick=${() => ask(...asks)}>${children}</button>`;

/** The one dialog. The token is kept in memory only, while this page is open. */
export class Confirm extends Component {
  state = { title: "", text: "", path: "", body: {}, error: "" };
  token = "";
  dialog = createRef();
  input = createRef();

  componentDidMount() {
    asking.listener = (asked) => this.setState({ ...asked, error: "" }, () => { this.input.current.value = this.token; this.dialog.current.showModal(); });
  }

  async send(event) {
    event.preventDefault();
    this.token = this.input.current.value;
    try {
      const answer = await fetch(this.state.path, {
        method: "POST", headers: { authorization: `Bearer ${this.token}`, "content-type": "application/json" }, body: JSON.stringify(this.state.body),
      });
      if (answer.ok) { this.dialog.current.close(); return; }
      const { detail } = await answer.json().catch(() => ({}));
      this.setState({ error: `Refused (${answer.status}): ${detail || answer.statusText}` });
    } catch (error) {
      this.setState({ error: `The admin port does not answer (${error.message})` });
    }
  }

  render() {
    const { title, text, error } = this.state;
    return html`<dialog ref=${this.dialog} aria-labelledby="confirm-title">
      <form method="dialog" onSubmit=${(event) => this.send(event)}>
        <h2 id="confirm-title">${title || "Confirm"}</h2>
        <p>${text}</p>
        <label for="token">Admin token</label>
        <input id="token" ref=${this.input} type="password" autocomplete="off" spellcheck=${false} />
        <p class="error" role="alert">${error}</p>
        <div class="controls">
          <button type="button" onClick=${() => this.dialog.current.close()}>Cancel</button>
          <button type="submit" class="primary">Confirm</button>
        </div>
      </form>
    </dialog>`;
  }
}

// --- text -------------------------------------------------------------------------------------------------------------

/** What a figure answers, and what it does not mean. */
export const Explain = ({ asks, not, children }) => html`<details class="explain"><summary>${asks}</summary><p>${children} <b>Does not mean:</b> ${not}</p></details>`;
export const Coloured = ({ as, children }) => html`<span class="${as}-text">${children}</span>`;
/** Of a page, whose title it is unless it has another `level`. */
export const Section = ({ title, children, level = "h1", id = title.toLowerCase().replace(/[^a-z]+/g, "-") }) => html`<section aria-labelledby=${id}><${level} id=${id}>${title}<//>${children}</section>`;

// --- drawings -----------------------------------------------------------------------------------------------------------

/** An interval and its estimate on a scale that ends at `to`. */
export function Interval({ low, mid, high, from = 0, to }) {
  const at = (x) => 100 * Math.min(1, Math.max(0, (x - from) / (to - from || 1))), left = at(known(low) ? low : from), right = at(known(high) ? high : to);
  return html`<svg class="interval" aria-hidden="true"><line class="axis" x1="0%" x2="100%" y1="7" y2="7" />
    ${from <= 0 && to > 0 && html`<line class="zero" x1="${at(0)}%" x2="${at(0)}%" y1="1" y2="13" />`}
    ${known(mid) && html`<rect class="span" x="${left}%" width="${Math.max(right - left, 0.5)}%" y="4" height="6" rx="1" /><rect class="mid" x="${Math.min(at(mid), 99)}%" width="3" y="1" height="12" />`}</svg>`;
}

/** A part of a whole. */
export const Bar = ({ share, bad }) => html`<svg class="interval" aria-hidden="true"><rect class="zero" fill="none" x="0" y="3" width="100%" height="8" />
  <rect class=${bad ? "full-part" : "part"} x="0" y="3" width="${100 * Math.min(1, Math.max(0, share || 0))}%" height="8" /></svg>`;

/** A line without axes, from 0 to its largest value. */
export function Spark({ values, level, label }) {
  const points = values.map((y, x) => [x, y]).filter(([, y]) => known(y));
  if (points.length < 2) return html`<p class="spark sub">${label}: no history yet</p>`;
  const most = Math.max(...points.map(([, y]) => y), known(level) ? level : 0) * 1.05 || 1, end = Math.max(1, values.length - 1);
  const at = ([x, y]) => `${fixed((100 * x) / end, 1)},${(28 - (26 * y) / most).toFixed(1)}`;
  return html`<figure class="spark"><svg viewBox="0 0 100 30" preserveAspectRatio="none" aria-hidden="true">
    ${known(level) && html`<line class="level" x1="0" x2="100" y1=${28 - (26 * level) / most} y2=${28 - (26 * level) / most} />`}
    <polyline points=${points.map(at).join(" ")} /></svg><figcaption>${label}</figcaption></figure>`;
}

/** The labels of a time axis: with seconds if two ticks are within one minute, so that none is there twice. */
export const clock = (ticks) => ticks.map((t) => new Date(1000 * t).toTimeString().slice(0, ticks.some((next, i) => i && next - ticks[i - 1] < 60) ? 8 : 5));

/** A chart over time. series: [label, css variable, values, dashed]; band: fill between the second and third one. */
export class Chart extends Component {
  room = createRef();

  componentDidMount() {
    this.drawn = () => { this.plot?.destroy(); this.plot = null; this.draw(); };
    this.sized = () => this.plot?.setSize({ width: this.room.current.clientWidth, height: this.props.height });
    addEventListener("resize", this.sized);
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.dark.addEventListener("change", this.drawn);
    this.draw();
  }

  componentWillUnmount() {
    removeEventListener("resize", this.sized);
    this.dark.removeEventListener("change", this.drawn);
    this.plot?.destroy();
  }

  shouldComponentUpdate(next) { return next.time !== this.props.time || next.marks?.length !== this.props.marks?.length; }
  componentDidUpdate() { this.draw(); }

  draw() {
    const { time, series } = this.props;
    if (!time || time.length < 2) { this.plot?.destroy(); this.plot = null; return; }
    if (this.plot) this.plot.setData([time, ...series.map(([, , values]) => values)]); else this.make();
    this.showLast(this.plot);
  }

  make() {
    const { time, series, band, show, height } = this.props, style = getComputedStyle(document.documentElement), colour = (key) => style.getPropertyValue(key).trim();
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
    this.plot = new uPlot({
      width: this.room.current.clientWidth, height,
      axes: [{ ...axis, values: (u, ticks) => clock(ticks) }, { ...axis, size: 62, values: (u, ticks) => ticks.map((t) => String(Number(t.toPrecision(3)))) }],
      series: [{ label: "at", value: (u, t) => when(t) }, ...series.map(([label, key, , dashed]) => ({
        label, stroke: colour(key), width: dashed ? 1 : 2, dash: dashed && [2, 4], spanGaps: false, value: (u, v) => show(v), points: { show: false },
      }))],
      bands: band ? [{ series: [3, 2], fill: colour("--band") }] : [],
      scales: { y: { range: () => [0, this.most()] } },
      hooks: { ready: [(u) => this.showLast(u)], draw: [(u) => this.mark(u, colour)] },
    }, [time, ...series.map(([, , values]) => values)], this.room.current);
  }

  /** The scale follows the estimates: a still very wide interval would make their changes invisible. */
  most() {
    const followed = this.props.series.filter(([, , , dashed]) => !dashed).flatMap(([, , values]) => values).filter(known);
    return 1.25 * Math.max(1e-3, ...followed);
  }

  /** Vertical lines with a letter each; the list below the chart says what they are. */
  mark(u, colour) {
    const { ctx } = u, { top, height } = u.bbox;
    (this.props.marks || []).forEach(({ at, bad, letter }) => {
      if (at < u.scales.x.min || at > u.scales.x.max) return;
      const x = Math.round(u.valToPos(at, "x", true));
      ctx.save();
      ctx.strokeStyle = ctx.fillStyle = colour(bad ? "--bad" : "--soft");
      ctx.lineWidth = devicePixelRatio;
      ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.beginPath(); ctx.moveTo(x, top); ctx.lineTo(x, top + height); ctx.stroke();
      ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
      ctx.fillText(letter, x + 3 * devicePixelRatio, top + 10 * devicePixelRatio);
      ctx.restore();
    });
  }

  /** The last values in the legend while no pointer is over the chart. */
  showLast(u) {
    if (!known(u.cursor.left) || u.cursor.left < 0) u.setLegend({ idx: u.data[0].length - 1 });
  }

  render({ time, label, height }) {
    const empty = !time || time.length < 2;
    return html`<div class="plot"><div ref=${this.room} role="img" aria-label=${label}></div>
      ${empty && html`<p class="sub">No history yet: it is kept in memory since the start of Hemostat, and the first points come within half a minute.</p>`}</div>`;
  }
}

// --- tables -----------------------------------------------------------------------------------------------------------

/** columns: [heading, cell(row), value to sort by(row) if it sorts]. More rows than `fold` are folded. */
export class Table extends Component {
  state = { by: null, down: true, open: false };

  sort(n) { this.setState(({ by, down }) => ({ by: n, down: by === n ? !down : true })); }

  render({ caption, columns, rows, fold = 10, empty = "nothing yet" }, { by, down, open }) {
    const value = by === null ? null : columns[by][2];
    const sorted = value ? [...rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      return (typeof x === "string" ? x.localeCompare(y) : (x ?? -Infinity) - (y ?? -Infinity)) * (down ? -1 : 1);
    }) : rows;
    const shown = open ? sorted : sorted.slice(0, fold);
    return html`<div class="scroll" tabindex="0" role="region" aria-label=${caption}><table><caption>${caption}</caption>
      ${rows.length > 0 && html`<thead><tr>${columns.map(([heading, , sorts], n) => html`<th scope="col" aria-sort=${by === n ? (down ? "descending" : "ascending") : undefined}>
        ${sorts ? html`<button type="button" class="sort" onClick=${() => this.sort(n)}>${heading}${by === n ? (down ? " ↓" : " ↑") : ""}</button>` : heading}</th>`)}</tr></thead>`}
      <tbody>${rows.length ? shown.map((row) => html`<tr>${columns.map(([, cell], n) => {
        const made = cell(row), text = typeof made === "string" && made.length > 48 ? "text" : undefined;
        return n ? html`<td class=${text}>${made}</td>` : html`<th scope="row">${made}</th>`;
      })}</tr>`) : html`<tr><td>${empty}</td></tr>`}</tbody></table>
      ${rows.length > fold && html`<button type="button" class="fold" onClick=${() => this.setState({ open: !open })}>${open ? "Show fewer" : `Show all ${rows.length}`}</button>`}</div>`;
  }
}

/** Names and values, one below the other. */
export const Facts = ({ of }) => html`<dl class="facts">${of.map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}</dl>`;
