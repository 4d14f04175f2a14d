// The report page. Plain JavaScript over one block of JSON; nothing is loaded from anywhere.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = new Map(data.models.map((model) => [model.id, model]));
  const trials = data.models.filter((model) => model.kind === "trial");
  const baselines = data.models.filter((model) => model.role);
  const PALETTE = ["#2f7fd1", "#e06c1f", "#2a9d74", "#c25aa0", "#c79a00", "#5b61d6", "#d14343",
    "#3aa6b9", "#8a6d3b", "#7a9a2e", "#9b6ad6", "#d9729f"];
  const SHAPES = { both: "circle", coarse: "diamond", fine: "triangle", shared: "square" };
  const AXES = {
    size: { key: "size_bytes", title: "size of the model file", log: true, show: bytes },
    time: { key: "render_seconds", title: "seconds a view", log: true, show: seconds },
  };
  const PLANES = [
    { name: "PSNR", x: "size", y: "psnr", up: true, title: "PSNR (dB)", show: (v) => v.toFixed(2) + " dB" },
    { name: "MSE", x: "size", y: "mse", up: false, log: true, title: "MSE", show: (v) => v.toPrecision(3) },
    { name: "SSIM", x: "size", y: "ssim", up: true, title: "SSIM", show: (v) => v.toFixed(3) },
    { name: "render time", x: "size", y: "render_seconds", up: false, log: true,
      title: "seconds a view", show: seconds },
  ];
  if (trials.some((m) => m.m.validation_psnr !== undefined)) {
    PLANES.push({ name: "validation", x: "size", y: "validation_psnr", up: true,
      title: "PSNR on validation rays (dB)", show: (v) => v.toFixed(2) + " dB on validation rays" });
  }
  const state = {
    plane: 0, colour: data.colour, off: {}, average: data.models.some((m) => m.seeds > 1),
    published: true, elsewhere: false, onlyFront: false, logX: true, chosen: null, at: 50, left: "truth",
    right: "model", view: data.views[0], loss: true,
  };
  const redraws = [];

  // --- small things ----------------------------------------------------------------------

  function h(name, attributes = {}, ...children) {
    const svg = ["svg", "g", "path", "circle", "line", "rect", "text", "title", "polyline"].includes(name);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name)
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }
  const $ = (id) => document.getElementById(id);
  function bytes(n) {
    if (n >= 999500) return (n / 1e6).toFixed(n < 9.995e6 ? 2 : 0) + " MB";
    return n >= 9995 ? Math.round(n / 1e3) + " kB" : (n / 1e3).toFixed(1) + " kB";
  }
  function seconds(s) { return s < 0.1 ? (1000 * s).toPrecision(2) + " ms" : s.toPrecision(2) + " s"; }
  function median(list) { return [...list].sort((a, b) => a - b)[Math.floor((list.length - 1) / 2)]; }
  function label(model) { return model.role ? model.role : model.name; }
  const say = (text) => { $("said").textContent = text; };

  // --- which models are shown ------------------------------------------------------------

  function passes(model) {
    return data.filters.every(({ key }) => !(state.off[key] && state.off[key].has(model.f[key])));
  }
  function visible() { return trials.filter(passes); }
  const colours = new Map();
  function colourOf(model) {
    if (model.kind !== "trial") return "var(--ink)";
    const value = model.f[state.colour];
    return colours.get(value) || "var(--ghost)";
  }
  function assignColours() {
    colours.clear();
    const count = new Map();
    for (const model of trials) count.set(model.f[state.colour], (count.get(model.f[state.colour]) || 0) + 1);
    [...count.keys()].sort((a, b) => String(a).localeCompare(String(b), "en", { numeric: true }))
      .forEach((value, i) => colours.set(value, i < PALETTE.length ? PALETTE[i]
        : `hsl(${(i * 137.5) % 360} 45% 55%)`));
  }

  // One point a model; averaged over calibration seeds, one a group, with its spread.
  function pointsOf(models, xKey, yKey) {
    const usable = models.filter((m) => m.m[xKey] > 0 && m.m[yKey] !== undefined && m.m[yKey] !== null);
    if (!state.average) {
      return usable.map((m) => ({ model: m, members: [m], x: m.m[xKey], y: m.m[yKey] }));
    }
    const groups = new Map();
    for (const m of usable) {
      const key = m.kind === "trial" ? m.group : m.id;
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(m);
    }
    return [...groups.values()].map((members) => {
      const ys = members.map((m) => m.m[yKey]), xs = members.map((m) => m.m[xKey]);
      const middle = median(ys);
      return {
        model: members.find((m) => m.m[yKey] === middle), members,
        x: xs.reduce((a, b) => a + b) / xs.length, y: ys.reduce((a, b) => a + b) / ys.length,
        low: Math.min(...ys), high: Math.max(...ys),
      };
    });
  }
  function frontOf(points, up) {
    const sorted = [...points].sort((a, b) => a.x - b.x || (up ? b.y - a.y : a.y - b.y));
    const kept = [];
    for (const p of sorted) {
      const last = kept[kept.length - 1];
      if (!last || (up ? p.y > last.y : p.y < last.y)) kept.push(p);
    }
    return kept;
  }

  // --- drawing ---------------------------------------------------------------------------

  function scale(low, high, from, to, log) {
    if (log) { low = Math.log10(low); high = Math.log10(high); }
    if (high - low < 1e-12) { low -= 0.5; high += 0.5; }
    const f = (v) => from + ((log ? Math.log10(v) : v) - low) / (high - low) * (to - from);
    f.low = low; f.high = high; f.log = log;
    return f;
  }
  function ticks(f, wanted) {
    if (f.log) {
      const found = [];
      for (let d = Math.floor(f.low) - 1; d <= Math.ceil(f.high); d++) {
        for (const k of [1, 2, 5]) {
          const t = Math.log10(k) + d;
          if (t >= f.low - 1e-9 && t <= f.high + 1e-9) found.push(k * 10 ** d);
        }
      }
      if (found.length >= 2) {
        const step = Math.max(1, Math.ceil(found.length / (wanted + 1)));
        return found.filter((_, i) => i % step === 0);
      }
      return niceTicks(10 ** f.low, 10 ** f.high, wanted);
    }
    return niceTicks(f.low, f.high, wanted);
  }
  function niceTicks(low, high, wanted) {
    const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((s) => s >= raw);
    const found = [];
    for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) found.push(+t.toPrecision(12));
    return found;
  }
  function shape(kind, x, y, r) {
    if (kind === "square") return `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`;
    if (kind === "diamond") { const s = r * 1.3; return `M${x},${y - s}l${s},${s}l${-s},${s}l${-s},${-s}z`; }
    if (kind === "triangle") { const s = r * 1.25; return `M${x},${y - s}l${s},${1.9 * s}h${-2 * s}z`; }
    if (kind === "star") {
      let d = "";
      for (let i = 0; i < 10; i++) {
        const a = Math.PI * (i / 5 - 0.5), q = i % 2 ? r * 0.62 : r * 1.5;
        d += `${i ? "L" : "M"}${x + q * Math.cos(a)},${y + q * Math.sin(a)}`;
      }
      return d + "z";
    }
    return `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`;
  }
  function frame(host, height, margins, name) {
    const width = Math.max(280, Math.round(host.clientWidth));
    const svg = h("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": name });
    host.querySelectorAll(":scope > svg").forEach((old) => old.remove());
    host.prepend(svg);
    return { svg, width, height, left: margins[3], right: width - margins[1], top: margins[0],
      bottom: height - margins[2] };
  }
  function axes(box, x, y, titles) {
    const g = h("g");
    for (const t of ticks(x, box.width / 75)) {
      g.append(h("line", { class: "grid", x1: x(t), x2: x(t), y1: box.top, y2: box.bottom }),
        h("text", { x: x(t), y: box.bottom + 17, "text-anchor": "middle" }, titles.showX(t)));
    }
    for (const t of ticks(y, box.height / 60)) {
      g.append(h("line", { class: "grid", x1: box.left, x2: box.right, y1: y(t), y2: y(t) }),
        h("text", { x: box.left - 7, y: y(t) + 4, "text-anchor": "end" }, titles.showY(t)));
    }
    g.append(h("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
      h("text", { class: "title", x: (box.left + box.right) / 2, y: box.height - 4, "text-anchor": "middle" }, titles.x),
      h("text", { class: "title", x: 2, y: 11 }, titles.y));
    box.svg.append(g);
  }
  function tip(host, x, y, title, lines) {
    let node = host.querySelector(":scope > .tip");
    if (!title) { if (node) node.remove(); return; }
    if (!node) { node = h("div", { class: "tip" }); host.append(node); }
    node.replaceChildren(h("b", {}, title), ...lines.map((line) => h("div", {}, line)));
    const wide = host.clientWidth, w = node.offsetWidth, svg = host.querySelector("svg");
    const k = wide / svg.viewBox.baseVal.width;
    node.style.left = Math.max(0, Math.min(wide - w, x * k - w / 2)) + "px";
    const above = y * k - node.offsetHeight - 12;
    node.style.top = (above < -30 ? y * k + 16 : above) + "px";
  }
  function place(svg, event) {
    const rect = svg.getBoundingClientRect(), k = svg.viewBox.baseVal.width / rect.width;
    return [(event.clientX - rect.left) * k, (event.clientY - rect.top) * k];
  }

  // --- the front -------------------------------------------------------------------------

  const host = $("front");
  let shown = [];
  function drawFront() {
    const plane = PLANES[state.plane], axis = AXES[plane.x];
    const mine = pointsOf(visible(), axis.key, plane.y);
    const others = pointsOf(baselines, axis.key, plane.y);
    const ghosts = data.published.filter((p) => (p.same ? state.published : state.elsewhere)
      && p[axis.key] && p[plane.y] !== undefined)
      .map((p) => ({ published: p, x: p[axis.key], y: p[plane.y], members: [] }));
    const box = frame(host, Math.max(330, Math.min(520, host.clientWidth * 0.66)), [26, 16, 40, 54],
      `Size against ${plane.name}: ${mine.length} points`);
    const best = frontOf([...mine, ...others.filter((p) => p.model.kind !== "control")], plane.up);
    const onFront = new Set(best.map((p) => p.model.id));
    let dots = state.onlyFront ? mine.filter((p) => onFront.has(p.model.id)) : mine;
    const all = [...dots, ...others, ...ghosts];
    if (!all.length) {
      box.svg.append(h("text", { x: box.width / 2, y: box.height / 2, "text-anchor": "middle" },
        trials.length ? "No trial passes the filters." : "No trial has a result."));
      shown = [];
      return;
    }
    const xs = all.map((p) => p.x), ys = all.flatMap((p) => [p.low ?? p.y, p.high ?? p.y]);
    const logX = state.logX;
    const padX = logX ? (Math.max(...xs) / Math.min(...xs)) ** 0.05 : 0;
    const spanX = (Math.max(...xs) - Math.min(...xs)) * 0.05 || 1;
    const x = logX ? scale(Math.min(...xs) / padX, Math.max(...xs) * padX, box.left, box.right, true)
      : scale(Math.max(0, Math.min(...xs) - spanX), Math.max(...xs) + spanX, box.left, box.right, false);
    const logY = plane.log && Math.max(...ys) / Math.min(...ys) > 3;
    const padY = logY ? (Math.max(...ys) / Math.min(...ys)) ** 0.06 : (Math.max(...ys) - Math.min(...ys)) * 0.06 || 0.5;
    const y = logY ? scale(Math.min(...ys) / padY, Math.max(...ys) * padY, box.bottom, box.top, true)
      : scale(Math.min(...ys) - padY, Math.max(...ys) + padY, box.bottom, box.top, false);
    axes(box, x, y, { x: axis.title + (logX ? " (log)" : ""), y: plane.title,
      showX: (v) => axis.show(v).replace(/\.0+ /, " "),
      showY: plane.y === "render_seconds" ? seconds : (v) => +v.toPrecision(4) + "" });
    const dense = others.filter((p) => p.model.role === "dense");
    for (const p of dense) {
      box.svg.append(h("line", { x1: box.left, x2: box.right, y1: y(p.y), y2: y(p.y), stroke: "var(--soft)",
        "stroke-dasharray": "2 4" }));
    }
    const steps = best.map((p, i) => i ? `H${x(p.x)}V${y(p.y)}` : `M${x(p.x)},${y(p.y)}`).join("");
    if (best.length) {
      box.svg.append(h("path", { d: steps + `H${box.right}`, fill: "none", stroke: "var(--mark)",
        "stroke-width": 2, "stroke-opacity": 0.55 }));
    }
    const g = h("g", { class: "dots" });
    for (const role of new Set(others.map((p) => p.model.role))) {
      const same = others.filter((p) => p.model.role === role && p.model.kind === "control").sort((a, b) => a.x - b.x);
      if (same.length > 1) {
        g.append(h("polyline", { points: same.map((p) => `${x(p.x)},${y(p.y)}`).join(" "), fill: "none",
          stroke: "var(--soft)", "stroke-dasharray": "5 4" }));
      }
    }
    for (const p of ghosts) {
      g.append(h("path", { d: shape("triangle", x(p.x), y(p.y), 5.5), fill: "none", stroke: "var(--soft)",
        "stroke-width": 1.5, "stroke-dasharray": p.published.same ? null : "2.5 1.5", class: "ghost" }));
    }
    const order = [...dots].sort((a, b) => onFront.has(a.model.id) - onFront.has(b.model.id));
    for (const p of order) {
      const front = onFront.has(p.model.id), colour = colourOf(p.model);
      if (p.members.length > 1) {
        g.append(h("line", { x1: x(p.x), x2: x(p.x), y1: y(p.low), y2: y(p.high), stroke: colour,
          "stroke-width": 1.6 }));
        for (const end of [p.low, p.high]) {
          g.append(h("line", { x1: x(p.x) - 4, x2: x(p.x) + 4, y1: y(end), y2: y(end), stroke: colour,
            "stroke-width": 1.6 }));
        }
      }
      g.append(h("path", { d: shape(SHAPES[p.model.f.networks], x(p.x), y(p.y), front ? 5.6 : 4.2), fill: colour,
        class: front ? null : "off", stroke: front ? "var(--card)" : "none", "stroke-width": 1.2,
        "data-id": p.model.id }));
    }
    for (const p of others) {
      g.append(h("path", { d: shape("star", x(p.x), y(p.y), 5.6), fill: "var(--ink)", stroke: "var(--card)",
        "stroke-width": 1.2, "data-id": p.model.id }));
    }
    box.svg.append(g);
    nameBaselines(box, others, ghosts, [...dots, ...best], x, y);
    shown = [...dots, ...others, ...ghosts].map((p) => ({ ...p, px: x(p.x), py: y(p.y) }));
    const chosen = shown.find((p) => p.members.some((m) => m.id === state.chosen));
    if (chosen) {
      box.svg.append(h("circle", { cx: chosen.px, cy: chosen.py, r: 10, fill: "none", stroke: "var(--ink)",
        "stroke-width": 2, class: "ring" }));
    }
    box.svg.addEventListener("pointermove", (event) => {
      const near = nearest(...place(box.svg, event));
      tip(host, near ? near.px : 0, near ? near.py : 0, near && titleOf(near), near ? linesOf(near, plane) : []);
    });
    box.svg.addEventListener("pointerleave", () => tip(host));
    box.svg.addEventListener("click", (event) => {
      const near = nearest(...place(box.svg, event));
      if (near && near.model) choose(near.model.id, true);
    });
  }
  // Where a name may stand beside its mark, the best place first; without a free one it is left out.
  const PLACES = [[10, -8, "start"], [-10, -8, "end"], [10, 17, "start"], [-10, 17, "end"], [0, -18, "middle"],
    [0, 28, "middle"], [14, 4, "start"], [-14, 4, "end"], [0, -32, "middle"], [0, 42, "middle"],
    [12, -22, "start"], [-12, -22, "end"], [12, 31, "start"], [-12, 31, "end"]];
  function nameBaselines(box, others, ghosts, trials, x, y) {
    const mark = (p) => [x(p.x) - 7, y(p.y) - 7, 14];
    const taken = [...others, ...trials].map(mark);
    const wanted = [...others.map((p) => [p, p.model.role]), ...ghosts.map((p) => [p, p.published.name])];
    const named = new Set();
    let own = true; // the sweep's own names come first, published marks give way to them
    for (const [p, text] of wanted) {
      if (named.has(text)) continue;
      named.add(text);
      if (p.published && own) { own = false; taken.push(...ghosts.map(mark)); }
      let placed = false;
      const name = h("text", { class: "name", "fill-opacity": p.published ? 0.7 : 1 }, text);
      box.svg.append(name);
      const w = name.getComputedTextLength();
      for (const [dx, dy, anchor] of PLACES) {
        const left = x(p.x) + dx - (anchor === "end" ? w : anchor === "middle" ? w / 2 : 0), top = y(p.y) + dy - 11;
        const free = left > box.left && left + w < box.right + 12 && top > box.top - 20 && top + 14 < box.bottom
          && !taken.some((t) => left < t[0] + t[2] && t[0] < left + w && Math.abs(t[1] - top) < 14);
        if (free) {
          taken.push([left, top, w]);
          for (const [key, value] of Object.entries({ x: x(p.x) + dx, y: y(p.y) + dy, "text-anchor": anchor })) {
            name.setAttribute(key, value);
          }
          placed = true;
          break;
        }
      }
      if (!placed) name.remove();
    }
  }
  function nearest(px, py, reach = 26) {
    let found = null, best = reach;
    for (const p of shown) {
      const d = Math.hypot(p.px - px, p.py - py);
      if (d < best) { best = d; found = p; }
    }
    return found;
  }
  function titleOf(p) { return p.published ? p.published.name : label(p.model); }
  function linesOf(p, plane) {
    if (p.published) {
      return [`${bytes(p.x)} · ${plane.show(p.y)}`, p.published.note || "", p.published.source].filter(Boolean);
    }
    const lines = [`${bytes(p.model.m.size_bytes)} · ${plane.show(p.y)}`];
    if (p.members.length > 1) {
      lines.push(`${p.members.length} calibration seeds: ${plane.show(p.low)} to ${plane.show(p.high)}`);
    }
    if (plane.y !== "psnr" && p.model.m.psnr !== undefined) lines.push(p.model.m.psnr.toFixed(2) + " dB");
    lines.push("click to look at it");
    return lines;
  }
  host.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowLeft: -1, Home: "first", End: "last" };
    const move = moves[event.key];
    if (event.key === "Escape") tip(host);
    if (event.key === "Enter" && byId.has(state.chosen)) {
      event.preventDefault();
      $("chosen").focus();
    }
    if (move === undefined) return;
    event.preventDefault();
    const order = shown.filter((p) => p.model).sort((a, b) => a.x - b.x || a.y - b.y);
    if (!order.length) return;
    const now = order.findIndex((p) => p.members.some((m) => m.id === state.chosen));
    const next = move === "first" ? 0 : move === "last" ? order.length - 1
      : Math.max(0, Math.min(order.length - 1, now < 0 ? 0 : now + move));
    choose(order[next].model.id, false);
    const p = shown.find((q) => q.model && q.model.id === order[next].model.id);
    tip(host, p.px, p.py, titleOf(p), linesOf(p, PLANES[state.plane]).slice(0, -1));
    say(`${titleOf(p)}: ${linesOf(p, PLANES[state.plane])[0]}`);
  });
  host.addEventListener("blur", () => tip(host));
  $("chosen").addEventListener("keydown", (event) => { if (event.key === "Escape") host.focus(); });

  // --- controls --------------------------------------------------------------------------

  function segments(id, names, current, pick) {
    const node = $(id);
    names.forEach((name, i) => node.append(h("button", {
      type: "button", "aria-pressed": String(i === current),
      onclick: (event) => {
        node.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", String(b === event.currentTarget)));
        pick(i);
      },
    }, name)));
  }
  function check(text, value, set) {
    return h("label", { class: "check" }, h("input", {
      type: "checkbox", ...(value ? { checked: "" } : {}),
      onchange: (event) => { set(event.target.checked); redraw(); },
    }), text);
  }
  function controls() {
    segments("planes", PLANES.map((p) => p.name), 0, (i) => { state.plane = i; drawFront(); count(); });
    const row = $("switches");
    const colour = h("select", { "aria-label": "colour by", onchange: (e) => { state.colour = e.target.value; redraw(); } },
      ...[{ key: "method", label: "method" }, ...data.filters].map((f) => h("option", {
        value: f.key, selected: f.key === state.colour ? "" : null }, "colour: " + f.label)));
    row.append(colour);
    if (data.models.some((m) => m.seeds > 1)) {
      row.append(check("mean of calibration seeds", state.average, (v) => { state.average = v; }));
    }
    row.append(check("only the front", state.onlyFront, (v) => { state.onlyFront = v; }),
      check("log size", state.logX, (v) => { state.logX = v; }));
    if (data.published.some((p) => p.same)) {
      row.append(check("published", state.published, (v) => { state.published = v; }));
    }
    if (data.published.some((p) => !p.same)) {
      const other = check("published elsewhere", state.elsewhere, (v) => { state.elsewhere = v; });
      other.title = "another resolution, or a mean over scenes: not directly comparable";
      row.append(other);
    }
    const box = $("filters");
    for (const { key, label: name, values } of data.filters) {
      const chips = values.map((value) => h("button", {
        type: "button", class: "chip", "aria-pressed": "true", "data-key": key, "data-value": value,
        title: "click: on or off; double click, or Shift and Enter: this one only",
        onclick: (event) => (event.shiftKey ? only(key, value, values) : toggle(key, value)),
        ondblclick: () => only(key, value, values),
      }, value));
      box.append(h("fieldset", {}, h("legend", {}, name), ...chips));
    }
    $("filter-box").open = window.innerWidth > 720;
    $("filter-box").hidden = !data.filters.length;
    $("reset").addEventListener("click", () => { state.off = {}; press(); redraw(); });
  }
  function toggle(key, value) {
    state.off[key] = state.off[key] || new Set();
    if (!state.off[key].delete(value)) state.off[key].add(value);
    press(); redraw();
  }
  function only(key, value, values) {
    state.off[key] = new Set(values.filter((other) => other !== value));
    press(); redraw();
  }
  function press() {
    document.querySelectorAll(".chip").forEach((chip) => {
      const off = state.off[chip.dataset.key];
      chip.setAttribute("aria-pressed", String(!(off && off.has(chip.dataset.value))));
    });
  }
  function legend() {
    const seen = new Set(visible().map((m) => m.f[state.colour]));
    $("legend").replaceChildren(...[...colours].filter(([value]) => seen.has(value)).map(([value, colour]) => {
      const dot = h("i"); dot.style.background = colour;
      return h("li", {}, dot, value);
    }), ...[...new Set(visible().map((m) => m.f.networks))].map((n) =>
      h("li", {}, ({ circle: "●", diamond: "◆", triangle: "▲", square: "■" })[SHAPES[n]] || "●", " " + n)),
    h("li", {}, "★ baseline"), h("li", {}, "━ front"),
    ...(data.published.some((p) => p.same) && state.published ? [h("li", {}, "△ published")] : []),
    ...(state.elsewhere ? [h("li", {}, "△ dashed: published for another resolution or as a mean over scenes, " +
      "not directly comparable")] : []));
    count();
  }
  function count() {
    const mine = visible(), plane = PLANES[state.plane];
    const without = mine.filter((m) => m.m[plane.y] === undefined).length;
    $("count").textContent = `${mine.length} of ${trials.length} trials` + (without
      ? `; ${without} of them have no ${plane.name === "validation" ? "PSNR on all validation rays" : plane.name}` +
        (plane.y === "psnr" && PLANES[PLANES.length - 1].name === "validation"
          ? " on held-out views: they are under “validation”" : "") : "");
    $("reset").hidden = mine.length === trials.length;
  }

  // --- the chosen model ------------------------------------------------------------------

  function picture(model, what) {
    if (!model) return null;
    if (what === "truth") return (data.truth[model.training] || {})[state.view];
    const of = what === "dense" ? data.models.find((m) => m.role === "dense" && m.training === model.training) : model;
    const pair = of && (data.pictures[of.id] || {})[state.view];
    return pair ? pair[what === "error" ? 1 : 0] : null;
  }
  const SIDES = { truth: "ground truth", dense: "dense", model: "this model", error: "error map" };
  function drawChosen() {
    const model = byId.get(state.chosen), box = $("chosen");
    if (!model) {
      box.replaceChildren(h("p", { class: "soft" }, "Choose a point: click it, or move with the arrow keys."));
      return;
    }
    const dense = data.models.find((m) => m.role === "dense" && m.training === model.training);
    const m = model.m, d = dense ? dense.m : {};
    const parts = [h("h3", {}, label(model)), h("p", { class: "soft" }, model.kind === "trial" ? "trial " : "",
      h("code", {}, model.id), model.front ? " · on the front" : "",
      m.validation_psnr === undefined ? "" : ` · ${m.validation_psnr.toFixed(2)} dB on validation rays`)];
    const number = (value, text, name, more) => value === undefined || value === null ? null
      : h("div", {}, h("b", {}, text), h("span", {}, name + (more ? ` · ${more}` : "")));
    const numbers = [
      number(m.psnr, m.psnr === undefined ? "" : m.psnr.toFixed(2) + " dB", "PSNR",
        d.psnr !== undefined && model !== dense ? signed(m.psnr - d.psnr, 2) + " dB" : ""),
      number(m.size_bytes, bytes(m.size_bytes || 0), "file",
        d.size_bytes && model !== dense ? "÷ " + (d.size_bytes / m.size_bytes).toFixed(1) : ""),
      number(m.ssim, m.ssim === undefined ? "" : m.ssim.toFixed(3), "SSIM"),
      number(m.mse, m.mse === undefined ? "" : m.mse.toPrecision(3), "MSE"),
      number(m.render_seconds, seconds(m.render_seconds || 0), "a view"),
      number(m.flops_per_ray, ((m.flops_per_ray || 0) / 1e6).toFixed(1) + " M", "FLOPs a ray"),
    ].filter(Boolean);
    parts.push(h("div", { class: "numbers" }, ...numbers));
    parts.push(...swipe(model));
    parts.push(...layers(model, dense));
    const rows = Object.entries(model.config).flatMap(([k, v]) => [h("dt", {}, k), h("dd", {}, String(v))]);
    parts.push(h("details", {}, h("summary", {}, "Configuration"), h("dl", {}, ...rows)));
    if (model.command) {
      const code = h("code", {}, model.command);
      parts.push(h("div", { class: "copy" }, code, h("button", {
        type: "button", class: "button",
        onclick: (event) => copy(code, event.currentTarget),
      }, "copy")));
    }
    box.replaceChildren(...parts);
  }
  function copy(node, button) {
    const done = () => { button.textContent = "copied"; say("copied"); };
    const mark = () => getSelection().selectAllChildren(node); // to be copied by hand
    if (navigator.clipboard) navigator.clipboard.writeText(node.textContent).then(done, mark);
    else mark();
  }
  function signed(value, digits) { return (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(digits); }
  function swipe(model) {
    const options = Object.keys(SIDES).filter((what) => picture(model, what) && !(model.role === "dense" && what === "dense"));
    if (!options.length) return [h("p", { class: "none" }, "No picture of this model was kept.")];
    const pickSide = (side, fallback) => options.includes(state[side]) ? state[side] : fallback;
    const left = pickSide("left", options[0]);
    const right = pickSide("right", options.find((what) => what === "model" && what !== left) || options[options.length - 1]);
    const stack = h("div", { class: "swipe" });
    stack.style.setProperty("--at", state.at + "%");
    const range = h("input", {
      type: "range", min: 0, max: 100, step: 1, value: state.at,
      "aria-label": `swipe between ${SIDES[left]} and ${SIDES[right]}`,
      oninput: (event) => { state.at = +event.target.value; stack.style.setProperty("--at", state.at + "%"); },
    });
    stack.append(h("img", { src: picture(model, left), alt: SIDES[left] + " of view " + state.view }),
      h("img", { src: picture(model, right), alt: SIDES[right] + " of view " + state.view }),
      h("span", { class: "tag left" }, SIDES[left]), h("span", { class: "tag right" }, SIDES[right]),
      h("div", { class: "handle" }), range);
    const side = (name, value) => h("label", {}, name, h("select", {
      "aria-label": name + " picture", onchange: (e) => { state[name] = e.target.value; drawChosen(); },
    }, ...options.map((o) => h("option", { value: o, ...(o === value ? { selected: "" } : {}) }, SIDES[o]))));
    const found = [stack, h("div", { class: "sides" }, side("left", left), side("right", right))];
    if (left === "error" || right === "error") {
      found.push(h("p", { class: "soft" }, "Error map: mean error of the three colours, black for 0, " +
        `white from ${data.error_white} on.`));
    }
    const views = Object.keys(data.pictures[model.id] || {});
    if (views.length > 1) {
      const bar = h("div", { class: "row" }, h("span", { class: "soft" }, "held-out view"));
      for (const view of views) {
        bar.append(h("button", { type: "button", class: "chip pill", "aria-pressed": String(String(state.view) === view),
          onclick: () => { state.view = view; drawChosen(); drawGallery(); } }, view));
      }
      found.push(bar);
    }
    const score = model.views.find((v) => String(v.view) === String(state.view));
    if (score) found.push(h("p", { class: "soft" }, `View ${state.view}: ${score.psnr.toFixed(2)} dB` +
      (score.ssim ? `, SSIM ${score.ssim.toFixed(3)}` : "")));
    return found;
  }
  function layers(model, dense) {
    const names = Object.keys(model.widths);
    if (!names.length) return [];
    const parts = [h("h3", {}, "Channels left, layer by layer")];
    for (const name of names) {
      const mine = model.widths[name], full = (dense && dense.widths[name]) || mine;
      const top = Math.max(...full), n = mine.length, w = 400 / n, height = 62;
      const kept = mine.map((v, i) => `layer ${i} ${v} of ${full[i]}`).join(", ");
      const svg = h("svg", { viewBox: `0 0 400 ${height + 30}`, role: "img", "aria-label": `${name}: ${kept}` });
      mine.forEach((v, i) => {
        const x = i * w + w * 0.12, bw = w * 0.76, tall = height * full[i] / top, h0 = height * v / top;
        svg.append(h("rect", { x, y: height - tall, width: bw, height: tall, rx: 3, fill: "var(--wash)",
          stroke: "var(--line)" }), h("rect", { x, y: height - h0, width: bw, height: Math.max(h0, 1), rx: 3,
          fill: model.kind === "trial" ? colourOf(model) : "var(--soft)" }),
        h("text", { x: x + bw / 2, y: height + 12, "text-anchor": "middle" }, String(v)),
        h("text", { x: x + bw / 2, y: height + 25, "text-anchor": "middle" },
          v < full[i] ? "−" + Math.round(100 * (1 - v / full[i])) + " %" : ""));
      });
      parts.push(h("div", { class: "layers" }, h("span", { class: "soft" }, name), svg));
    }
    return parts;
  }
  function choose(id, jump) {
    state.chosen = id;
    if (!Object.keys(data.pictures[id] || {}).includes(String(state.view))) {
      state.view = Object.keys(data.pictures[id] || {})[0] ?? state.view;
    }
    drawFront(); drawChosen(); drawDetail(); drawGallery(); drawParallel();
    document.querySelectorAll("tr.now").forEach((row) => row.classList.remove("now"));
    document.querySelectorAll(`tr[data-id="${CSS.escape(id)}"]`).forEach((row) => row.classList.add("now"));
    try { history.replaceState(null, "", "#model=" + id); } catch { /* a page in a frame may not */ }
    if (jump && window.innerWidth < 1056) $("chosen").scrollIntoView({ block: "start" });
  }

  // --- gallery, detail, history, parameters ----------------------------------------------

  function frontModels() {
    const plane = PLANES[0];
    return frontOf(visible().filter((m) => m.m.size_bytes && m.m.psnr !== undefined)
      .map((m) => ({ model: m, x: m.m.size_bytes, y: m.m.psnr })), plane.up).map((p) => p.model);
  }
  function drawGallery() {
    const box = $("gallery");
    if (!box) return;
    const dense = data.models.find((m) => m.role === "dense");
    const front = frontModels();
    const cells = [];
    if (dense && (data.truth[dense.training] || {})[state.view]) {
      cells.push(h("button", { type: "button", onclick: () => choose(dense.id, true) },
        h("img", { src: data.truth[dense.training][state.view], alt: "photo of view " + state.view }),
        h("span", {}, h("b", {}, "ground truth"), "held-out view " + state.view)));
    }
    for (const model of [...(dense ? [dense] : []), ...[...front].reverse()]) {
      const pair = (data.pictures[model.id] || {})[state.view];
      if (!pair || !pair[0]) continue;
      cells.push(h("button", { type: "button", "aria-pressed": String(model.id === state.chosen),
        onclick: () => choose(model.id, true) },
      h("img", { src: pair[0], alt: `render of ${label(model)}`, decoding: "async" }),
      h("span", {}, h("b", {}, `${bytes(model.m.size_bytes)} · ${model.m.psnr.toFixed(2)} dB`), label(model))));
    }
    box.replaceChildren(...(cells.length ? cells : [h("p", { class: "none" }, "No picture was kept.")]));
  }

  function drawDetail() {
    const box0 = $("detail");
    if (!box0) return;
    const dense = data.models.find((m) => m.role === "dense" && m.detail);
    const front = frontModels().filter((m) => m.detail);
    const some = front.length <= 5 ? front : [0, 1, 2, 3, 4].map((i) => front[Math.round(i * (front.length - 1) / 4)]);
    const chosen = byId.get(state.chosen);
    const lines = [...some.map((m) => [m, 0]), ...(chosen && chosen.detail && chosen !== dense ? [[chosen, 1]] : [])];
    if (dense && !state.loss) lines.unshift([dense, 2]);
    const value = (m, k) => {
      if (!state.loss) return m.detail[k];
      const base = data.models.find((b) => b.role === "dense" && b.training === m.training);
      return base && base.detail ? m.detail[k] - base.detail[k] : null;
    };
    const box = frame(box0, 320, [26, 92, 40, 54], "PSNR by detail of the photo");
    const ys = lines.flatMap(([m]) => m.detail.map((_, k) => value(m, k))).filter((v) => v !== null && isFinite(v));
    if (!ys.length) {
      box.svg.append(h("text", { x: box.width / 2, y: 150, "text-anchor": "middle" }, "Not measured by these trials."));
      return;
    }
    if (state.loss) ys.push(0);
    const n = 5, pad = (Math.max(...ys) - Math.min(...ys)) * 0.08 || 0.5;
    const x = (k) => box.left + 20 + k * (box.right - box.left - 40) / (n - 1);
    const y = scale(Math.min(...ys) - pad, Math.max(...ys) + pad, box.bottom, box.top, false);
    for (const t of ticks(y, 5)) {
      box.svg.append(h("line", { class: "grid", x1: box.left, x2: box.right, y1: y(t), y2: y(t) }),
        h("text", { x: box.left - 7, y: y(t) + 4, "text-anchor": "end" }, String(t).replace("-", "−")));
    }
    const narrow = x(1) - x(0) < 90;
    ["flattest", "2", "3", "4", "most detailed"].forEach((text, k) => box.svg.append(h("text", {
      x: x(k), y: box.bottom + 17, "text-anchor": "middle" }, narrow && k === 3 ? "" : text)));
    box.svg.append(h("text", { class: "title", x: (box.left + box.right) / 2, y: 316, "text-anchor": "middle" },
      "fifths of the pixels, by gradient of the photo"), h("text", { class: "title", x: 2, y: 11 },
      state.loss ? "dB against dense" : "PSNR (dB)"));
    const ends = [];
    for (const [m, how] of lines) {
      const colour = how === 2 ? "var(--ink)" : how === 1 ? "var(--ink)" : colourOf(m);
      const points = m.detail.map((_, k) => [k, value(m, k)]).filter(([, v]) => v !== null && isFinite(v));
      if (!points.length) continue;
      const d = points.map(([k, v], i) => `${i ? "L" : "M"}${x(k)},${y(v)}`).join("");
      const path = h("path", { d, fill: "none", stroke: colour, "stroke-width": how === 1 ? 3 : 2,
        "stroke-dasharray": how === 2 ? "5 4" : null });
      path.append(h("title", {}, label(m)));
      box.svg.append(path, ...points.map(([k, v]) => h("circle", { cx: x(k), cy: y(v), r: 3, fill: colour })));
      ends.push([y(points[points.length - 1][1]), (how === 2 ? "dense" : how === 1 ? "chosen, " : "") +
        (how === 2 ? "" : bytes(m.m.size_bytes))]);
    }
    ends.sort((a, b) => a[0] - b[0]);
    let last = -99;
    for (const [at, text] of ends) {
      last = Math.max(at + 4, last + 13);
      box.svg.append(h("text", { x: box.right + 2, y: last }, text));
    }
  }

  function drawHistory() {
    const box0 = $("history");
    if (!box0 || data.history.length < 2) return;
    const values = data.history, box = frame(box0, 320, [26, 16, 40, 54], "hypervolume over trials");
    const x = scale(1, values.length, box.left, box.right, false);
    const y = scale(0, Math.max(...values) * 1.06 || 1, box.bottom, box.top, false);
    axes(box, x, y, { x: "trials with a result, in the order they ended", y: data.history_unit,
      showX: (v) => String(Math.round(v)), showY: (v) => +v.toPrecision(3) + "" });
    const d = values.map((v, i) => i ? `H${x(i + 1)}V${y(v)}` : `M${x(1)},${y(v)}`).join("");
    box.svg.append(h("path", { d: `${d}V${y(0)}H${x(1)}z`, fill: "var(--mark)", "fill-opacity": 0.1 }),
      h("path", { d, fill: "none", stroke: "var(--mark)", "stroke-width": 2 }));
  }

  function drawImportance() {
    for (const [id, list] of Object.entries(data.importance)) {
      const box = $("importance-" + id);
      if (!box) continue;
      const top = Math.max(...list.map((e) => e.share), 1e-9);
      box.replaceChildren(...list.flatMap(({ name, share }) => {
        const bar = h("i"); bar.style.width = Math.max(1, 100 * share / top) + "%";
        return [h("span", {}, name), bar, h("span", {}, Math.round(100 * share) + " %")];
      }));
      if (!list.length) box.replaceChildren(h("p", { class: "none" }, "No parameter varies."));
    }
  }

  function drawParallel() {
    const box0 = $("parallel");
    if (!box0) return;
    const searched = data.quality !== "psnr", quality = (m) => m.m[data.quality];
    const ratios = searched ? data.layers : [];
    const models = trials.filter((m) => quality(m) !== undefined && m.m.size_bytes
      && ratios.every((r) => m.config[r.key] !== undefined));
    if (!models.length) return;
    const columns = [...data.parallel.map((f) => ({ ...f, of: (m) => m.f[f.key] }))
      .filter((f) => !searched || new Set(models.map(f.of)).size > 1),
    ...ratios.map((r) => ({ ...r, of: (m) => m.config[r.key], number: true, show: (v) => Math.round(100 * v) + " %" })),
      { label: "file", of: (m) => m.m.size_bytes, number: true, log: true, show: bytes },
      { label: searched ? "validation" : "PSNR", of: quality, number: true, show: (v) => v.toFixed(1) }];
    const host0 = box0.querySelector(".wide") || box0;
    const width = Math.max(host0.clientWidth, 704, 108 * columns.length), height = 360, top = 40, bottom = height - 22;
    const svg = h("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
      "aria-label": "parallel coordinates of all trials" });
    host0.querySelectorAll("svg").forEach((old) => old.remove());
    const gap = (width - 190) / Math.max(columns.length - 1, 1);
    columns.forEach((c, i) => {
      c.x = 60 + i * gap;
      if (c.number) {
        const vs = models.map(c.of);
        const f = scale(Math.min(...vs), Math.max(...vs), bottom, top, c.log);
        c.y = (m) => f(c.of(m)); c.f = f;
      } else {
        const order = new Map(c.values.map((v, k) => [v, c.values.length < 2 ? (top + bottom) / 2
          : bottom - k * (bottom - top) / (c.values.length - 1)]));
        c.y = (m) => order.get(c.of(m)); c.order = order;
      }
    });
    const psnrs = models.map(quality), low = Math.min(...psnrs), high = Math.max(...psnrs);
    const shade = (m) => {
      const t = high > low ? (quality(m) - low) / (high - low) : 1;
      return `hsl(${250 - 200 * t} ${55 + 25 * t}% ${48 + 4 * t}%)`;
    };
    const lines = models.map((m) => ({ m, on: passes(m) })).sort((a, b) => a.on - b.on || quality(a.m) - quality(b.m));
    for (const { m, on } of lines) {
      const points = columns.map((c) => [c.x, c.y(m)]);
      const d = points.map(([px, py], i) => {
        if (!i) return `M${px},${py}`;
        const [qx, qy] = points[i - 1], mid = (px + qx) / 2;
        return `C${mid},${qy} ${mid},${py} ${px},${py}`;
      }).join("");
      const now = m.id === state.chosen;
      const path = h("path", { d, fill: "none", stroke: now ? "var(--ink)" : on ? shade(m) : "var(--grid)",
        "stroke-width": now ? 3 : 1.3, "stroke-opacity": now ? 1 : on ? 0.7 : 0.6, onclick: () => choose(m.id, false) });
      path.style.cursor = "pointer";
      path.append(h("title", {}, `${label(m)}: ${bytes(m.m.size_bytes)}, ${quality(m).toFixed(2)} dB`));
      svg.append(path);
    }
    columns.forEach((c, i) => {
      svg.append(h("line", { class: "axis", x1: c.x, x2: c.x, y1: top, y2: bottom }),
        h("text", { class: "title", x: c.x, y: 16, "text-anchor": "middle" }, c.label));
      const marks = c.number ? ticks(c.f, 5).map((t) => [c.f(t), c.show(t)]) : [...c.order].map(([v, at]) => [at, v]);
      const lastOne = i >= columns.length - 2;
      for (const [at, text] of marks) {
        const short = String(text).length > 20 ? String(text).slice(0, 19) + "…" : String(text);
        svg.append(h("text", { class: "name", x: c.x + (lastOne && i === columns.length - 1 ? 8 : 6), y: at + 4 }, short));
      }
    });
    host0.append(svg);
  }

  // --- the table -------------------------------------------------------------------------

  function table() {
    const all = $("trials-table");
    if (!all) return;
    const body = all.querySelector("tbody");
    const rows = [...body.querySelectorAll("tr[data-id]")];
    rows.forEach((row) => row.addEventListener("click", () => {
      choose(row.dataset.id, false);
      $("front").scrollIntoView({ block: "center" });
    }));
    all.querySelectorAll("thead th").forEach((head, column) => {
      const text = head.textContent;
      head.replaceChildren(h("button", {
        type: "button",
        onclick: () => {
          const up = head.getAttribute("aria-sort") !== "ascending";
          all.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
          head.setAttribute("aria-sort", up ? "ascending" : "descending");
          const key = (row) => row.children[column].dataset.v ?? row.children[column].textContent;
          body.append(...rows.sort((a, b) => (up ? 1 : -1) *
            String(key(a)).localeCompare(String(key(b)), "en", { numeric: true })));
        },
      }, text));
    });
  }
  function filterTable() {
    document.querySelectorAll("#trials-table tr[data-id]").forEach((row) => {
      const model = byId.get(row.dataset.id);
      row.hidden = Boolean(model) && !passes(model);
    });
  }

  // --- start -----------------------------------------------------------------------------

  function redraw() {
    assignColours(); legend(); drawFront(); drawChosen(); drawGallery(); drawDetail(); drawParallel(); filterTable();
  }
  document.querySelectorAll("img[data-picture]").forEach((img) => {
    const [id, view, which] = img.dataset.picture.split("/");
    img.src = which === "2" ? data.truth[id][view] : data.pictures[id][view][+which];
  });
  const themes = ["auto", "light", "dark"];
  $("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme || "auto";
    const next = themes[(themes.indexOf(now) + 1) % 3];
    if (next === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    $("theme").textContent = "theme: " + next;
  });
  if ($("losses")) {
    segments("losses", ["loss against dense", "PSNR"], 0, (i) => { state.loss = i === 0; drawDetail(); });
  }
  controls(); table(); drawHistory(); drawImportance();
  const asked = (location.hash.match(/^#model=(\w+)/) || [])[1];
  state.chosen = byId.has(asked) ? asked : data.first;
  redraw();
  if (state.chosen) choose(state.chosen, false);
  if (!asked) try { history.replaceState(null, "", location.pathname + location.search); } catch { /* the same */ }
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) { width = window.innerWidth; redraw(); drawHistory(); }
  });
  window.addEventListener("hashchange", () => {
    const id = (location.hash.match(/^#model=(\w+)/) || [])[1];
    if (byId.has(id)) choose(id, true);
  });
})();
