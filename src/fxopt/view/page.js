"use strict";
// The page reads its data, compares two stages of the program, folds equal blocks, and shows both side by side. Text is only ever set as text.

const data = JSON.parse(document.getElementById("data").textContent);
const [NAME, TARGET, ARGUMENTS, TYPE, PATH, KIND, SOURCE, CODE, PASSES, READS, STATE, BYTES, FLOPS, NANOSECONDS] = Array(14).keys();
const text = (row, column) => data.strings[row[column]];
const $ = (id) => document.getElementById(id);
const MANY = 400; // rows that are opened at first, at most
const FOUND = 200; // hits that are listed, at most

/** A new element with a class, text, and children. */
function make(tag, kind, said, ...children) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (said !== undefined && said !== null) element.textContent = said;
  element.append(...children);
  return element;
}

const stages = data.stages.map((stage, number) => {
  const ids = [];
  for (let at = 0; at < stage.nodes.length; at += 2) for (let i = 0; i < stage.nodes[at + 1]; i++) ids.push(stage.nodes[at] + i);
  const nodes = ids.map((id, at) => ({ id, row: data.rows[id], at, key: stage.keys[at], loose: stage.loose[at], stage: number }));
  const byName = new Map(nodes.map((node) => [text(node.row, NAME), node]));
  return { ...stage, nodes, byName };
});

// -- numbers in words ------------------------------------------------------------------------------------------------

function scaled(value, units, step) {
  let at = 0;
  while (value >= step && at < units.length - 1) { value /= step; at++; }
  return `${value >= 100 || Number.isInteger(value) ? Math.round(value) : value.toPrecision(3)} ${units[at]}`;
}
const bytes = (value) => scaled(value, ["B", "KiB", "MiB", "GiB", "TiB"], 1024);
const seconds = (value) => value >= 1 ? `${value.toPrecision(3)} s` : value >= 1e-3 ? `${(value * 1e3).toPrecision(3)} ms` : `${(value * 1e6).toPrecision(3)} µs`;

/** What can be shown beside every node: a value, and the same in words. `null`: nothing to show. */
const OVERLAYS = {
  type: { title: "types", value: () => null, said: () => "" },
  bytes: { title: "bytes of the value", value: (node) => node.row[BYTES] || null, said: bytes },
  flops: { title: "FLOPs (forward)", value: (node) => node.row[FLOPS] || null, said: (v) => scaled(v, ["F", "kF", "MF", "GF", "TF"], 1000) },
  time: { title: "predicted time (forward)", value: (node) => node.row[NANOSECONDS] || null, said: (v) => seconds(v / 1e9) },
  dtype: { title: "dtype", value: () => null, said: () => "", label: (node) => text(node.row, TYPE).replace(/^\(+/, "").split("[")[0] },
  saved: { title: "saved for the backward", value: (node) => (stages[node.stage].saved || {})[node.at] || null, said: bytes, has: (stage) => stage.saved },
  error: { title: "difference to the captured value", value: (node) => stages[node.stage].error[node.at] ?? null, said: (v) => v === 0 ? "0" : v.toExponential(1), has: () => data.verified, max: true },
};

// -- comparing two stages --------------------------------------------------------------------------------------------

const block = (path) => (/^(.*?\b\d+(?:@\d+)?)(?=\.|$)/.exec(path) || [path])[0];
const INPUTS = " inputs"; // no module has such a path
const indexed = (name) => /(^|\.)\d+(@\d+)?$/.test(name);
const family = (name) => name.replace(/\d+(@\d+)?$/, "#");

/** Positions of a longest increasing subsequence. */
function increasing(values) {
  const ends = [], before = new Array(values.length).fill(-1);
  values.forEach((value, at) => {
    let low = 0, high = ends.length;
    while (low < high) { const middle = (low + high) >> 1; if (values[ends[middle]] < value) low = middle + 1; else high = middle; }
    if (low > 0) before[at] = ends[low - 1];
    ends[low] = at;
  });
  const found = [];
  for (let at = ends.length ? ends[ends.length - 1] : -1; at >= 0; at = before[at]) found.push(at);
  return found.reverse();
}

/** Rows {a, b, block}: a node before, a node after, or both where they have the same name. */
function compared(left, right) {
  const common = left.nodes.filter((node) => right.byName.has(text(node.row, NAME)));
  const places = common.map((node) => right.byName.get(text(node.row, NAME)).at);
  const rows = [];
  const put = (a, b) => rows.push({ a, b, block: text((b || a).row, TARGET) === "input" ? INPUTS : block(text((b || a).row, PATH)) });
  let i = 0, j = 0;
  const gap = (untilA, untilB) => { // what has no counterpart: modules side by side, node beside node
    const path = (node) => text(node.row, PATH);
    const run = (nodes, at, until) => { let end = at; while (end < until && path(nodes[end]) === path(nodes[at])) end++; return end; };
    const later = (nodes, at, until, wanted) => { for (; at < until; at++) if (path(nodes[at]) === wanted) return true; return false; };
    while (i < untilA || j < untilB) {
      const a = left.nodes[i], b = right.nodes[j];
      const endA = i < untilA ? run(left.nodes, i, untilA) : i, endB = j < untilB ? run(right.nodes, j, untilB) : j;
      if (endA > i && endB > j && path(a) === path(b)) while (i < endA || j < endB) put(i < endA ? left.nodes[i++] : null, j < endB ? right.nodes[j++] : null);
      else if (endA > i && (endB === j || !later(right.nodes, j, untilB, path(a)))) while (i < endA) put(left.nodes[i++], null);
      else while (j < endB) put(null, right.nodes[j++]);
    }
  };
  for (const at of increasing(places)) {
    gap(common[at].at, places[at]);
    put(left.nodes[i++], right.nodes[j++]);
  }
  gap(left.nodes.length, right.nodes.length);
  return rows;
}

/** How a node of one side stands to the other stage. */
function status(node, other, after) {
  const twin = other.byName.get(text(node.row, NAME));
  if (twin) return twin.id === node.id ? "same" : "changed";
  if (!after) return "removed";
  return text(node.row, TARGET).startsWith("fxopt.") || text(node.row, ARGUMENTS).includes("fxopt.") ? "fused" : fusedItem(node) ? "fused" : "added";
}
function fusedItem(node) { // an item of a fused op's value
  if (text(node.row, TARGET) !== "getitem") return false;
  const source = stages[node.stage].byName.get(data.strings[node.row[READS][0]]);
  return source !== undefined && text(source.row, TARGET).startsWith("fxopt.");
}

/** Sections of one block each, then spans of equal units: {sections, period, count}. */
function spans(rows) {
  const sections = [];
  for (const row of rows) {
    const last = sections[sections.length - 1];
    if (last && last.block === row.block) last.rows.push(row);
    else sections.push({ block: row.block, rows: [row] });
  }
  for (const section of sections) {
    const key = (column) => section.rows.map((row) => `${row.kind}:${row.a ? row.a[column] : ""}:${row.b ? row.b[column] : ""}`).join("|");
    section.strict = key("key");
    section.loose = key("loose");
  }
  const equal = (at, to, period, column) => {
    for (let k = 0; k < period; k++) {
      const a = sections[at + k], b = sections[to + k];
      if (!a || !b || a[column] !== b[column] || family(a.block) !== family(b.block)) return false;
    }
    return true;
  };
  const found = [];
  for (let at = 0; at < sections.length;) {
    let best = { at, period: 1, count: 1 };
    for (let period = 1; period <= 4; period++) {
      if (!sections.slice(at, at + period).some((section) => indexed(section.block))) continue;
      let count = 1;
      if (equal(at, at + period, period, "loose")) for (count = 2; equal(at + period, at + period * count, period, "strict"); count++);
      if (count > 1 && count * period > best.count * best.period) best = { at, period, count };
    }
    found.push({ period: best.period, count: best.count, sections: sections.slice(best.at, best.at + best.period * best.count) });
    at += best.period * best.count;
  }
  return found;
}

// -- the view --------------------------------------------------------------------------------------------------------

const view = { left: 0, right: stages.length - 1, overlay: "type", only: false, cells: [], current: null, shown: [], most: 1 };

function show() {
  const left = stages[view.left], right = stages[view.right];
  const rows = compared(left, right);
  for (const row of rows) {
    row.a && (row.aKind = status(row.a, right, false));
    row.b && (row.bKind = status(row.b, left, true));
    row.kind = `${row.aKind || ""}/${row.bKind || ""}`;
  }
  view.shown = spans(view.only ? rows.filter((row) => row.kind !== "same/same") : rows);
  const overlay = OVERLAYS[view.overlay];
  view.most = Math.max(Number.MIN_VALUE, ...[0].concat(...[left, right].map((stage) => stage.nodes.map((node) => overlay.value(node) || 0))));
  summary(rows);
  draw();
  for (const button of $("passes").querySelectorAll("button"))
    button.setAttribute("aria-current", String(Number(button.dataset.right) === view.right && Number(button.dataset.left) === view.left));
  $("left").value = view.left;
  $("right").value = view.right;
  $("before").textContent = `before: ${left.title}`;
  $("after").textContent = view.left === view.right ? left.title : `after: ${right.title}`;
  document.querySelector(".heads").classList.toggle("one", view.left === view.right);
  $("graph").classList.toggle("one", view.left === view.right);
}

function draw() {
  const graph = $("graph");
  graph.replaceChildren();
  view.current = null;
  let open = 0;
  for (const span of view.shown) {
    const units = Array.from({ length: span.count }, (_, k) => span.sections.slice(k * span.period, (k + 1) * span.period));
    const holder = make("div", "unit");
    let chosen = 0;
    const fill = (from) => {
      holder.replaceChildren();
      units[chosen].forEach((section, at) => holder.append(blockOf(section, span, units, at === 0, () => chosen, (k) => { chosen = k; fill(true); }, from)));
    };
    const size = units[0].reduce((sum, section) => sum + section.rows.length, 0);
    span.choose = (section, keep) => {
      const k = units.findIndex((unit) => unit.includes(section));
      if (k !== chosen || !keep) { chosen = k; fill(true); }
    };
    const opened = open + size <= MANY;
    if (opened) open += size;
    fill(opened);
    graph.append(holder);
  }
  const first = graph.querySelector("button");
  if (!first) graph.append(make("p", "where", "Nothing differs between these two."));
}

/** One block: a bar, and its rows under the children of the block's module. */
function blockOf(section, span, units, head, chosen, choose, opened) {
  const holder = make("div", "block");
  const bar = make("button", "bar");
  bar.type = "button";
  const nodes = section.rows.map((row) => row.b || row.a);
  const kind = text(nodes[0].row, KIND);
  const inputs = section.block === INPUTS;
  const name = inputs ? "inputs" : section.block || "the model itself";
  bar.append(make("span", "name", span.count > 1 && indexed(section.block) ? folded(section.block, span) : name), make("span", "kind", inputs ? "" : kind));
  const end = make("span", "end", null);
  if (span.count > 1 && head) end.append(make("span", "times", `×${span.count}`));
  end.append(...counts(section.rows), total(section.rows));
  bar.append(end);
  const body = make("div", "body");
  const set = (on) => {
    bar.setAttribute("aria-expanded", String(on));
    body.hidden = !on;
    if (on && !body.firstChild) body.append(...inside(section));
  };
  bar.addEventListener("click", () => set(bar.getAttribute("aria-expanded") !== "true"));
  holder.append(bar);
  if (span.count > 1 && head) {
    const pick = make("select");
    pick.setAttribute("aria-label", "which of the equal blocks is shown");
    units.forEach((unit, k) => { const option = make("option", null, unit[0].block); option.value = k; pick.append(option); });
    pick.value = chosen();
    pick.addEventListener("change", () => choose(Number(pick.value)));
    holder.append(make("div", "pick", `${span.count} equal blocks, each on the one before; shown: `, pick));
  }
  holder.append(body);
  section.open = () => set(true);
  set(opened);
  return holder;
}

function folded(name, span) {
  const numbers = span.sections.filter((section) => family(section.block) === family(name)).map((section) => Number(/(\d+)(@\d+)?$/.exec(section.block)[1]));
  return name.replace(/\d+(@\d+)?$/, `${Math.min(...numbers)} … ${Math.max(...numbers)}`);
}

function counts(rows) {
  const tally = {};
  for (const row of rows) for (const kind of [row.aKind, row.bKind]) if (kind && kind !== "same") tally[kind] = (tally[kind] || 0) + (kind === "changed" ? 0.5 : 1);
  return Object.entries(MARKS).filter(([kind]) => tally[kind]).map(([kind, mark]) => {
    const badge = make("span", `count ${kind}`, `${mark} ${Math.ceil(tally[kind])}`);
    badge.title = kind;
    return badge;
  });
}
const MARKS = { removed: "−", added: "+", fused: "◆", changed: "~" };

/** The overlay's sum over a block, before and after. */
function total(rows) {
  const overlay = OVERLAYS[view.overlay];
  const sum = (side) => {
    const values = rows.map((row) => row[side] && overlay.value(row[side])).filter((value) => value);
    return values.length ? (overlay.max ? Math.max(...values) : values.reduce((a, b) => a + b, 0)) : 0;
  };
  const [a, b] = [sum("a"), sum("b")];
  if (!a && !b) return make("span", "value", "");
  return make("span", "value", view.left === view.right ? overlay.said(b) : `${overlay.said(a)} → ${overlay.said(b)}`);
}

function inside(section) {
  const found = [];
  let name = null, body = null;
  const within = (row) => {
    const path = text((row.b || row.a).row, PATH);
    return path.startsWith(section.block) && section.block ? path.slice(section.block.length + 1).split(".")[0] : "";
  };
  for (const row of section.rows) {
    const part = within(row);
    if (part !== name || !body) {
      name = part;
      body = make("div", "body");
      if (part) {
        const rows = [];
        for (let at = section.rows.indexOf(row); at < section.rows.length && within(section.rows[at]) === part; at++) rows.push(section.rows[at]);
        const bar = make("button", "bar"), own = body;
        bar.type = "button";
        bar.setAttribute("aria-expanded", "true");
        bar.append(make("span", "name", part), make("span", "end", null, ...counts(rows), total(rows)));
        bar.addEventListener("click", () => { own.hidden = !own.hidden; bar.setAttribute("aria-expanded", String(!own.hidden)); });
        found.push(make("div", "sub", null, bar, body));
      } else found.push(body);
    }
    body.append(line(row));
  }
  return found;
}

function line(row) {
  const one = view.left === view.right;
  const holder = make("div", `row ${row.kind === "same/same" ? "same" : ""}`);
  if (!one) holder.append(row.a ? cell(row.a, row.aKind, "a") : make("span", "empty"));
  holder.append(row.b ? cell(row.b, row.bKind, "b") : make("span", "empty"));
  return holder;
}

function cell(node, kind, side) {
  const button = make("button", `cell ${side} ${kind === "same" ? "" : kind}`);
  button.type = "button";
  button.tabIndex = -1;
  button.node = node;
  const overlay = OVERLAYS[view.overlay];
  const mark = make("span", "mark", MARKS[kind] || " ");
  mark.title = kind;
  button.append(mark, make("span", "op", operation(node)), make("span", "nm", text(node.row, NAME)), make("span", "ty", text(node.row, TYPE)));
  const value = overlay.value(node), label = overlay.label ? overlay.label(node) : value === null ? "" : overlay.said(value);
  if (view.overlay !== "type") {
    const shown = make("span", "val", label);
    if (value) shown.style.setProperty("--share", `${Math.max(2, 100 * Math.sqrt(value / view.most))}%`);
    button.append(shown);
  }
  button.setAttribute("aria-label", `${kind}: ${operation(node)} ${text(node.row, NAME)}, ${text(node.row, TYPE)}${label ? `, ${label}` : ""}`);
  return button;
}

function operation(node) {
  const target = text(node.row, TARGET);
  return target === "getitem" ? text(node.row, ARGUMENTS) : target === "input" ? `input ${text(node.row, ARGUMENTS)}` : target.replace(/\.default$/, "");
}

// -- what the pass did -----------------------------------------------------------------------------------------------

function tile(title, before, after) {
  return make("div", null, null, make("b", null, before === null || before === after ? after : `${before} → ${after}`), make("span", null, title));
}

function summary(rows) {
  const left = stages[view.left], right = stages[view.right], box = $("summary");
  const one = view.left === view.right;
  const single = view.right === view.left + 1;
  box.replaceChildren(make("h2", null, one ? right.title : single ? right.title : `${left.title} → ${right.title}`), make("p", null, one || single ? right.label : data.passes));
  const tiles = make("div", "tiles");
  tiles.append(tile("nodes", one ? null : String(left.nodes.length), String(right.nodes.length)));
  const [p, q] = [one ? null : left.predicted, right.predicted];
  if (q) {
    tiles.append(tile("peak of a step", p ? bytes(p.peak) : null, bytes(q.peak)), tile("forward and backward", p ? seconds(p.seconds) : null, seconds(q.seconds)));
    const sum = (stage) => Object.values(stage.saved || {}).reduce((a, b) => a + b, 0);
    tiles.append(tile("saved for the backward", p ? bytes(sum(left)) : null, bytes(sum(right))));
    for (const part of ["weights", "optimizer"]) if (q.parts[part]) tiles.append(tile(part, p && p.parts[part] ? bytes(p.parts[part]) : null, bytes(q.parts[part])));
  }
  const changes = make("div", null, null, make("b", null, null, ...counts(rows)), make("span", null, "nodes that differ"));
  if (!one) tiles.append(changes);
  box.append(tiles);
  const list = make("ul");
  if (single) {
    const rules = new Map();
    for (const found of right.did) rules.set(found[1], [...(rules.get(found[1]) || []), found]);
    for (const [rule, found] of rules) {
      const line = ([count, , places, source]) => make("li", null, null, make("span", "tag yes", `×${count}`), `${rule} in ${places} `, make("span", "where", source));
      if (found.length <= 5) { list.append(...found.map(line)); continue; }
      const rest = make("details", null, null, make("summary", null, `×${found.slice(1).reduce((sum, each) => sum + each[0], 0)} more of ${rule}, from ${found.length - 1} other lines of code`), make("ul", null, null, ...found.slice(1).map(line)));
      list.append(line(found[0]), make("li", null, null, rest));
    }
    for (const [count, rule, places, source, reason, advice] of right.did_not)
      list.append(make("li", null, null, make("span", "tag no", `not ×${count}`), `${rule} in ${places} `, make("span", "where", source), `: ${reason}`, make("span", "advice", advice ? ` — ${advice}` : "")));
    for (const note of right.notes) list.append(make("li", null, null, make("span", "tag info", "note"), note));
    if (right.promise) list.append(make("li", null, null, make("span", "tag info", "values"), right.promise));
    if (right.arguments.length) list.append(make("li", null, null, make("span", "tag info", "change"), right.arguments.map(([name, value]) => `${name}=${value}`).join(", ")));
  } else if (!one) {
    for (const stage of stages.slice(Math.min(view.left, view.right) + 1, Math.max(view.left, view.right) + 1)) {
      const fired = stage.did.reduce((sum, found) => sum + found[0], 0), missed = stage.did_not.reduce((sum, found) => sum + found[0], 0);
      list.append(make("li", null, null, make("span", fired ? "tag yes" : "tag info", fired ? `×${fired}` : "—"), `${stage.title}: ${stage.label}`, make("span", "advice", missed ? ` — ${missed} near-${missed > 1 ? "misses" : "miss"}` : "")));
    }
    for (const note of data.notes) list.append(make("li", null, null, make("span", "tag info", "note"), note));
  }
  box.append(list);
}

// -- one node --------------------------------------------------------------------------------------------------------

function detail(node) {
  const stage = stages[node.stage], row = node.row, box = $("detail");
  const close = make("button", "close", "×");
  close.setAttribute("aria-label", "Close");
  close.addEventListener("click", () => hide());
  const facts = make("dl");
  const fact = (name, ...said) => said.length && facts.append(make("dt", null, name), make("dd", null, null, ...said));
  const links = (names) => names.map((name) => {
    const link = make("button", null, name);
    link.addEventListener("click", () => go(node.stage, name));
    return link;
  });
  const name = text(row, NAME);
  fact("call", make("code", null, text(row, TARGET) === "input" ? `input ${text(row, ARGUMENTS)}` : text(row, TARGET) === "getitem" ? text(row, ARGUMENTS) : `${text(row, TARGET)}(${text(row, ARGUMENTS)})`));
  const twin = stages[node.stage === view.left ? view.right : view.left].byName.get(name);
  if (twin && twin.id !== node.id) {
    const columns = [ARGUMENTS, TYPE, STATE].filter((column) => String(twin.row[column]) !== String(row[column]));
    const said = (column) => column === STATE ? twin.row[STATE].map((id) => data.strings[id]).join("; ") || "no state" : text(twin.row, column);
    fact(`in “${stages[twin.stage].title}”`, ...columns.map((column) => make("div", null, null, make("code", null, said(column)))));
  }
  fact("type", make("code", null, text(row, TYPE)));
  fact("module", text(row, PATH) || "the model itself", text(row, KIND) ? ` (in a ${text(row, KIND)})` : "");
  if (text(row, SOURCE)) fact("source", make("code", null, text(row, SOURCE)), ...(text(row, CODE) ? [make("pre", null, text(row, CODE))] : []));
  fact("made by", text(row, PASSES) || "the capture");
  fact("value", bytes(row[BYTES]));
  if (row[FLOPS]) fact("FLOPs", OVERLAYS.flops.said(row[FLOPS]));
  if (row[NANOSECONDS]) fact("time", `${seconds(row[NANOSECONDS] / 1e9)}, predicted for the forward`);
  if (stage.saved) fact("saved", stage.saved[node.at] ? `${bytes(stage.saved[node.at])} kept for the backward` : "nothing kept for the backward");
  if (stage.error[node.at] !== undefined) fact("difference", `${stage.error[node.at].toExponential(2)} of the captured value's largest magnitude`);
  fact("reads", ...links(row[READS].map((id) => data.strings[id])));
  fact("state", ...row[STATE].map((id) => make("div", "where", data.strings[id])));
  fact("read by", ...links(stage.nodes.filter((other) => other.row[READS].includes(row[NAME])).map((other) => text(other.row, NAME))));
  if (stage.outputs.includes(name)) fact("returned", "as an output of the model");
  fact("stage", stage.title);
  box.replaceChildren(close, make("h2", null, name), facts);
  box.hidden = false;
}

function hide() {
  $("detail").hidden = true;
  if (view.current) view.current.focus();
}

/** Make a cell the current one; `say` also shows its node and puts it into the address. */
function select(button, say) {
  if (view.current) { view.current.removeAttribute("aria-current"); view.current.tabIndex = -1; }
  view.current = button;
  button.tabIndex = 0;
  button.setAttribute("aria-current", "true");
  button.focus({ preventScroll: true });
  button.scrollIntoView({ block: "nearest" });
  if (say || !$("detail").hidden) detail(button.node);
  if (say) history.replaceState(null, "", `#left=${view.left}&right=${view.right}&at=${button.node.stage}&node=${encodeURIComponent(text(button.node.row, NAME))}`);
}

/** Show a node of a stage: change the sides if the stage is on none, open its block, and say what it is. */
function go(stage, name) {
  const node = stages[stage] && stages[stage].byName.get(name);
  if (!node) return false;
  if (stage !== view.left && stage !== view.right) { view.left = Math.max(0, stage - 1); view.right = stage; show(); }
  if (view.only) { view.only = $("only").checked = false; show(); }
  for (const span of view.shown) for (const section of span.sections) {
    if (!section.rows.some((row) => row.a === node || row.b === node)) continue;
    span.choose(section, true);
    section.open();
    const button = [...$("graph").querySelectorAll(".cell")].find((each) => each.node === node);
    for (let up = button; up && up !== $("graph"); up = up.parentElement) up.hidden = false;
    select(button, true);
    button.scrollIntoView({ block: "center" });
    return true;
  }
  return false;
}

// -- finding ---------------------------------------------------------------------------------------------------------

/** For each stage, what is searched in, made when it is first needed. */
function hay(stage) {
  stage.hay = stage.hay || stage.nodes.map(({ row }) => [NAME, TARGET, ARGUMENTS, TYPE, PATH, SOURCE, PASSES].map((column) => text(row, column)).join("\n").toLowerCase());
  return stage.hay;
}

function find(said) {
  const box = $("hits"), words = said.toLowerCase().split(/\s+/).filter(Boolean);
  box.hidden = !words.length;
  if (!words.length) return 0;
  const right = stages[view.right], found = [];
  let many = 0;
  hay(right).forEach((each, at) => {
    if (!words.every((word) => each.includes(word))) return;
    if (many++ < FOUND) found.push(right.nodes[at]);
  });
  box.replaceChildren(make("p", null, many ? `${many} nodes of “${right.title}”${many > FOUND ? `, the first ${FOUND}` : ""}` : `nothing in “${right.title}” has ${words.join(" and ")}`));
  box.append(...found.map((node) => {
    const hit = make("button", null, null, make("b", null, operation(node)), make("span", null, text(node.row, NAME)), make("span", null, text(node.row, PATH)), make("span", null, text(node.row, SOURCE)));
    hit.type = "button";
    hit.addEventListener("click", () => go(view.right, text(node.row, NAME)));
    return hit;
  }));
  return many;
}

// -- controls --------------------------------------------------------------------------------------------------------

function passes() {
  const item = (title, left, right, note) => {
    const button = make("button", null, title, make("small", null, note));
    button.type = "button";
    button.title = title;
    button.dataset.left = left;
    button.dataset.right = right;
    button.addEventListener("click", () => { view.left = left; view.right = right; show(); find($("find").value); });
    $("passes").append(make("li", null, null, button));
  };
  if (stages.length > 2) item("all passes", 0, stages.length - 1, `${stages[0].nodes.length} → ${stages[stages.length - 1].nodes.length}`);
  stages.forEach((stage, at) => item(stage.title, Math.max(0, at - 1), at, at ? `${stages[at - 1].nodes.length} → ${stage.nodes.length}` : String(stage.nodes.length)));
}

function start() {
  document.title = `${data.model} — fxopt view`;
  $("model").textContent = data.model;
  $("sizes").textContent = Object.entries(data.sizes).map(([name, shape]) => `${name} [${shape.join(", ")}]`).join("  ");
  for (const id of ["left", "right"]) {
    stages.forEach((stage, at) => { const option = make("option", null, `${at}. ${stage.title}`); option.value = at; $(id).append(option); });
    $(id).addEventListener("change", () => { view[id] = Number($(id).value); show(); find($("find").value); });
  }
  for (const [key, overlay] of Object.entries(OVERLAYS)) {
    if (overlay.has && !stages.some((stage) => overlay.has(stage))) continue;
    const option = make("option", null, overlay.title);
    option.value = key;
    $("overlay").append(option);
  }
  $("overlay").addEventListener("change", () => { view.overlay = $("overlay").value; show(); });
  $("only").addEventListener("change", () => { view.only = $("only").checked; show(); });
  $("find").addEventListener("input", () => find($("find").value));
  $("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  $("graph").addEventListener("click", (event) => { const button = event.target.closest(".cell"); if (button) select(button, true); });
  document.addEventListener("keydown", keys);
  const head = () => document.documentElement.style.setProperty("--head", `${document.querySelector("header").offsetHeight}px`);
  addEventListener("resize", head);
  passes();
  if (!address()) show();
  head();
  addEventListener("hashchange", address);
}

/** Follow the address: `#left=0&right=3&at=3&node=mul_1`. */
function address() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const number = (name) => /^\d+$/.test(asked.get(name) || "") && stages[Number(asked.get(name))] ? Number(asked.get(name)) : null;
  if (!asked.has("right") && !asked.has("node")) return false;
  view.right = number("right") ?? stages.length - 1;
  view.left = number("left") ?? Math.max(0, view.right - 1);
  show();
  if (asked.has("node")) go(number("at") ?? view.right, asked.get("node"));
  return true;
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input, select");
  const cells = () => [...$("graph").querySelectorAll(".cell")].filter((each) => each.offsetParent !== null);
  const step = (by) => {
    const all = cells(), at = all.indexOf(view.current);
    const side = view.current && view.current.classList.contains("a") ? "a" : "b";
    const next = at < 0 ? all.find((each) => each.classList.contains("b")) || all[0] : (by > 0 ? all.slice(at + 1) : all.slice(0, at).reverse()).find((each) => each.classList.contains(side));
    if (next) select(next, false);
  };
  const pass = (by) => {
    const to = Math.min(stages.length - 1, Math.max(0, view.right + by));
    view.right = to;
    view.left = Math.max(0, to - 1);
    show();
  };
  const other = () => {
    const twin = view.current && [...view.current.parentElement.querySelectorAll(".cell")].find((each) => each !== view.current);
    if (twin) select(twin, false);
  };
  const actions = { "/": () => $("find").focus(), ArrowDown: () => step(1), ArrowUp: () => step(-1), j: () => step(1), k: () => step(-1), ArrowLeft: other, ArrowRight: other,
    "[": () => pass(-1), "]": () => pass(1), Escape: () => { if (typing) { $("find").value = ""; find(""); $("graph").focus(); } else hide(); } };
  if (typing && event.key !== "Escape") return;
  const action = actions[event.key];
  if (action && !(event.target.matches(".bar, nav button") && event.key.startsWith("Arrow") && !view.current && !cells().length)) { event.preventDefault(); action(); }
}

start();
