// The console: takes the events of /api/v1/stream and the history, and shows the page that the address names.
import { Component, render } from "./vendor/preact.mjs";
import { named } from "./format.js";
import { address, Confirm, html } from "./parts.js";
import { headline, Overview } from "./overview.js";
import { Alarm } from "./alarm.js";
import { Divergence } from "./divergence.js";
import { Engine, Engines } from "./engines.js";
import { Events } from "./events.js";
import { Gate } from "./gate.js";
import { Kind, Kinds } from "./kinds.js";
import { Measurement } from "./measurement.js";
import { Profile, Profiles } from "./profiles.js";

/** By the first part of the address: [title, page, page of one]. */
const PAGES = {
  "": ["Overview", Overview], divergence: ["Divergence", Divergence], kinds: ["Kinds", Kinds, Kind], profiles: ["Profiles", Profiles, Profile], engines: ["Engines", Engines, Engine],
  alarm: ["Alarm", Alarm], gate: ["Gate", Gate], measurement: ["Measurement", Measurement], events: ["Events", Events],
};
/** Of a page, the matching panel in Grafana: dashboard, panel. */
const PANELS = {
  "": ["hemostat-overview", 8], divergence: ["hemostat-overview", 8], kinds: ["hemostat-calibration", 19], profiles: ["hemostat-calibration", 2], engines: ["hemostat-overview", 22],
  alarm: ["hemostat-overview", 11], gate: ["hemostat-overview", 36], measurement: ["hemostat-shadow", 16], events: ["hemostat-calibration", 9],
};
const RANGES = { "15m": ["15 min", 900], "1h": ["1 h", 3600], "6h": ["6 h", 21600] };
const MAX_POINTS = 2160, RATE_STATES = 6, HISTORY_MS = 10000, RETRY_MS = 3000;

/** "#/kinds/chat%20text?range=6h" -> { path: ["kinds", "chat text"], chosen: { range: "6h" } } */
function parse(hash) {
  const [path, query] = hash.replace(/^#?\/?/, "").split("?"), parts = path.split("/").filter(Boolean).map((part) => { try { return decodeURIComponent(part); } catch { return part; } });
  return { path: Object.hasOwn(PAGES, parts[0]) ? parts : [], chosen: Object.fromEntries(new URLSearchParams(query)) };
}

/** The address of Grafana that this browser keeps, after `base` where one is given; some browsers keep nothing. */
function kept(base) {
  try {
    if (base) localStorage.setItem("grafana", base);
    return localStorage.getItem("grafana");
  } catch { return base ?? null; }
}

/** A link to the matching panel. Grafana's address is asked for once and kept in this browser: Hemostat does not know it. */
class Grafana extends Component {
  state = { base: kept() };

  ask() {
    const base = prompt("Address of Grafana; it is kept in this browser", "http://localhost:3000");
    if (!/^https?:\/\/[^\s]+$/.test(base ?? "")) return;
    this.setState({ base: kept(base.replace(/\/+$/, "")) });
  }

  render({ page, range }, { base }) {
    const [dashboard, panel] = PANELS[page];
    return base ? html`<a href=${`${base}/d/${dashboard}?viewPanel=${panel}&from=now-${range}&to=now`} target="_blank" rel="noopener">Grafana</a>` : html`<button type="button" onClick=${() => this.ask()}>Grafana …</button>`;
  }
}

class App extends Component {
  state = { s: null, p: null, past: {}, noticed: [], lost: false, ...parse(location.hash) };
  recent = [];
  fetched = 0;

  componentDidMount() {
    addEventListener("hashchange", () => this.setState(parse(location.hash), () => { scrollTo(0, 0); document.getElementById("main").focus({ preventScroll: true }); }));
    this.listen();
  }

  listen() {
    const stream = new EventSource("api/v1/stream");
    stream.addEventListener("state", (event) => {
      const { status, profiles } = JSON.parse(event.data);
      this.recent = [...this.recent, status].slice(-RATE_STATES);
      this.setState({ s: status, p: profiles, lost: false });
      document.documentElement.dataset.at = status.at;
      if (Date.now() - this.fetched > HISTORY_MS) { this.fetched = Date.now(); this.extend().catch(() => {}); }
    });
    stream.onerror = () => {
      this.setState({ lost: true });
      // The browser reconnects by itself unless the answer was an error.
      if (stream.readyState === EventSource.CLOSED) setTimeout(() => this.listen(), RETRY_MS);
    };
  }

  async extend() {
    const { past } = this.state, answer = await fetch(`api/v1/history?after=${past.time?.at(-1) ?? 0}`);
    if (!answer.ok) return;
    const { points, events } = await answer.json();
    this.setState({ noticed: events, past: Object.fromEntries(Object.entries(points).map(([name, values]) => [name, [...(past[name] || []), ...values].slice(-MAX_POINTS)])) });
  }

  /** The history within the chosen time, the same object as long as nothing is new. */
  within(seconds) {
    const { past } = this.state;
    if (this.cut?.of !== past || this.cut.seconds !== seconds) {
      const from = past.time?.findIndex((t) => t >= past.time.at(-1) - seconds) ?? 0;
      this.cut = { of: past, seconds, past: Object.fromEntries(Object.entries(past).map(([name, values]) => [name, values.slice(from)])) };
    }
    return this.cut.past;
  }

  /** Growth per second of a counter over the last states; null where it decreased: the server was restarted. */
  rate(read) {
    const [then] = this.recent, now = this.recent.at(-1), seconds = now.at - then.at;
    return seconds > 0 && read(now) >= read(then) ? (read(now) - read(then)) / seconds : null;
  }

  choose(what) { location.hash = address(this.state.path, { ...this.state.chosen, ...what }).slice(1); }

  render(_, { s, p, noticed, lost, path, chosen }) {
    const range = Object.hasOwn(RANGES, chosen.range) ? chosen.range : "1h", [title, Page, One] = PAGES[path[0] || ""];
    const found = s && headline({ s, p, lost }), alert = { bad: "ALARM – ", wait: s?.state.problems.length ? "WARNING – " : "" }[found?.as] ?? "";
    document.title = `${lost ? "NOT KNOWN – " : alert}${path.length ? `${path[1] ?? title} – ` : ""}Hemostat`;  // visible in a background tab
    const data = s && { s, p, noticed, lost, chosen, choose: (what) => this.choose(what), past: this.within(RANGES[range][1]), rate: (read) => this.rate(read), name: path[1] };
    return html`<button type="button" class="skip" onClick=${() => document.getElementById("main").focus()}>Skip to the content</button>
      <header><a class="brand" href="#/">Hemostat</a>
        <nav aria-label="Pages">${Object.entries(PAGES).map(([name, [text]]) => html`<a href=${address(name ? [name] : [], { range: chosen.range })} aria-current=${(path[0] || "") === name ? "page" : undefined}>${text}</a>`)}<a href="runbook">Runbook</a></nav>
        <label>Time <select id="range" value=${range} onChange=${(event) => this.choose({ range: event.target.value })}>${Object.entries(RANGES).map(([name, [text]]) => html`<option value=${name} selected=${name === range}>${text}</option>`)}</select></label>
        <${Grafana} page=${path[0] || ""} range=${range} />
        <p id="connection" class="pill ${lost ? "bad" : ""}">${lost ? "not connected" : s ? `${s.compressed.models.join(", ") || "no model known yet"} against ${s.reference.state === "ready" ? named(s.reference) : `its reference (${s.reference.state})`}` : "connecting …"}</p>
      </header>
      <main id="main" tabindex="-1" data-page=${path[0] || "overview"}>
        ${path.length > 0 && found && found.as !== "good" && html`<p class="problem ${found.as}-text"><a href="#/">${found.text}</a></p>`}
        ${data ? html`<${path[1] && One ? One : Page} key=${path.join("/")} ...${data} />` : html`<p class="sub">${lost ? "Whether anything is wrong is not known: the admin port does not answer" : "Waiting for the first state …"}</p>`}
      </main><${Confirm} />`;
  }
}

render(html`<${App} />`, document.getElementById("app"));
