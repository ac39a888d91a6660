"""The look of the page, and the few lines of script that read a value off a chart under the pointer."""

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --tint: #f4f6f7; --line: #e3e7ea; --ink: #15191d; --soft: #5b656e; --accent: #0b7285;
  --less: #1c7ec4; --more: #dd6b20;
  --hue1: #c2410c; --hue2: #7e22ce; --hue3: #15803d; --hue4: #a16207; --hue5: #be185d;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #101418; --tint: #191f24; --line: #2a323a; --ink: #e9edf0; --soft: #9ba7b1; --accent: #4fc3d7;
    --hue1: #ff9b61; --hue2: #c792ff; --hue3: #4ade80; --hue4: #facc15; --hue5: #ff7ab8; }
}
.hue1 { --accent: var(--hue1); } .hue2 { --accent: var(--hue2); } .hue3 { --accent: var(--hue3); }
.hue4 { --accent: var(--hue4); } .hue5 { --accent: var(--hue5); }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1080px; margin: 0 auto; padding: 56px 32px 72px; }
h1 {
  font-size: 44px; line-height: 1.12; font-weight: 650; letter-spacing: -0.022em; margin: 6px 0 14px;
  overflow-wrap: anywhere;
}
h2 { font-size: 25px; line-height: 1.25; font-weight: 620; letter-spacing: -0.012em; margin: 76px 0 24px; }
h3 { font-size: 16px; font-weight: 620; margin: 0 0 10px; }
p { margin: 0; }
.kind { color: var(--accent); font-weight: 600; font-size: 15px; }
.kind .state { color: var(--soft); font-weight: 400; }
.lead { font-size: 19px; line-height: 1.55; color: var(--soft); max-width: 44em; }
.lead b { color: var(--ink); font-weight: 600; }
.cards {
  display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 26px 32px; margin: 44px 0 0; padding: 0;
}
.cards div { border-top: 1px solid var(--line); padding-top: 12px; display: flex; flex-direction: column; }
.cards div:first-child { border-top-color: var(--accent); box-shadow: inset 0 1px var(--accent); }
.cards dt { order: 1; font-size: 14px; color: var(--soft); }
.cards dd {
  margin: 0; font-size: 26px; line-height: 1.25; font-weight: 600; letter-spacing: -0.015em; white-space: nowrap;
}
.cards div:first-child dd { color: var(--accent); }
.cards div .note, .cards div:first-child .note {
  order: 2; font-size: 13px; line-height: 1.45; font-weight: 400; letter-spacing: 0; white-space: normal;
  color: var(--soft); margin-top: 3px;
}
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 52px 44px; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { color: var(--soft); font-size: 14.5px; line-height: 1.5; margin-top: 10px; max-width: 60em; }
.head {
  display: flex; flex-wrap: wrap; gap: 2px 20px; font-size: 13px; color: var(--soft); margin-bottom: 12px;
  min-height: 21px;
}
.keys { margin-left: auto; display: flex; flex-wrap: wrap; gap: 2px 16px; }
.key { white-space: nowrap; }
.key i {
  display: inline-block; width: 18px; height: 0; border-top: 2px solid var(--accent); margin-right: 7px;
  vertical-align: middle;
}
.key i.raw { border-top: 5px solid color-mix(in srgb, var(--accent) 35%, transparent); }
.key i.dots { width: 8px; height: 8px; border: 0; border-radius: 50%; background: var(--ink); }
.key i.hue1, .key i.hue4, .key i.hue5 { border-top-style: dashed; }
.key i.hue2, .key i.hue3 { border-top-style: dotted; }
.key i.rule { border-top: 1.5px dashed var(--ink); }
.frame { position: relative; height: 210px; margin: 0 6px 0 46px; touch-action: pan-y; }
.frame.tall { height: 330px; }
.frame svg {
  position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; clip-path: inset(-1px -8px);
  display: block;
}
.frame path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round; }
.frame .grid { stroke: var(--line); stroke-width: 1; stroke-linecap: butt; }
.frame .line { stroke: var(--accent); stroke-width: 2; }
.frame .hue1 { stroke-dasharray: 7 4; } .frame .hue2 { stroke-dasharray: 2 4; }
.frame .hue3 { stroke-dasharray: 10 4 2 4; } .frame .hue4 { stroke-dasharray: 14 4; }
.frame .hue5 { stroke-dasharray: 4 2; }
.frame .raw { stroke: var(--accent); stroke-width: 1; stroke-opacity: 0.3; }
.frame .dots { stroke: var(--ink); stroke-width: 8; }
.frame .lone { stroke-width: 6; }
.frame .rule {
  stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 5 4; stroke-linecap: butt; stroke-opacity: 0.7;
}
.frame > span { position: absolute; font-size: 12.5px; line-height: 1; color: var(--soft); white-space: nowrap; }
.frame > .y { right: calc(100% + 9px); transform: translateY(50%); }
.frame > .x { top: calc(100% + 8px); transform: translateX(-50%); }
.frame > .cursor { top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.frame > .tip {
  top: 6px; padding: 8px 11px; background: var(--paper); color: var(--ink); border: 1px solid var(--line);
  border-radius: 8px;
  line-height: 1.5; white-space: pre; pointer-events: none; z-index: 1; box-shadow: 0 4px 16px rgb(0 0 0 / 0.12);
}
.xname { text-align: right; font-size: 12.5px; line-height: 1; color: var(--soft); margin: 28px 6px 0; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 28px 44px; }
.maps.many { grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); gap: 24px 28px; }
.map .head { margin-bottom: 6px; }
.map img { display: block; width: 100%; image-rendering: pixelated; background: var(--tint); border-radius: 3px; }
.ends { display: flex; justify-content: space-between; font-size: 12.5px; color: var(--soft); margin-top: 4px; }
.scale {
  display: grid; grid-template-columns: auto minmax(80px, 220px) auto; justify-content: center; align-items:
  center; gap: 10px; font-size: 12.5px; color: var(--soft); margin-top: 24px; line-height: 1.2;
}
.scale span:last-child { grid-column: 2; text-align: center; margin-top: -4px; }
.scale i {
  height: 10px; border-radius: 3px; background: linear-gradient(90deg, var(--less), var(--tint), var(--more));
}
.sample { border-left: 2px solid var(--accent); padding: 4px 0 4px 24px; margin: 0 0 20px; }
.sample h3 { color: var(--soft); font-weight: 500; font-size: 14px; margin: 0 0 8px; }
.sample pre {
  font: 17px/1.65 ui-serif, "Iowan Old Style", Charter, Georgia, serif; white-space: pre-wrap; overflow-wrap:
  anywhere; margin: 0; max-width: 40em;
}
details .sample { border-left-color: var(--line); margin: 22px 0 0; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 28px; }
.images.four { grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 20px; margin-bottom: 26px; }
.images img { display: block; width: 100%; image-rendering: pixelated; border-radius: 6px; background: var(--tint); }
summary { cursor: pointer; color: var(--accent); font-weight: 550; padding: 6px 0; width: fit-content; }
summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; border-radius: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td {
  text-align: left; font-weight: 400; padding: 9px 18px 9px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere;
}
th { color: var(--soft); }
tbody th { width: 30%; }
.num tbody th { width: auto; }
.num th, .num td { overflow-wrap: normal; white-space: nowrap; }
.num td, .num thead th { text-align: right; padding: 9px 0 9px 18px; }
.num td:first-child { padding-left: 0; }
.num tbody th { color: var(--ink); }
.num small { display: block; color: var(--soft); font-size: 13px; }
.num .best { color: var(--accent); font-weight: 600; }
.note { color: var(--soft); font-size: 14.5px; margin-top: 10px; max-width: 60em; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 44px; }
pre.config {
  font: 13.5px/1.65 ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--tint); border-radius:
  10px; padding: 20px 24px; overflow-x: auto; margin: 12px 0 0;
}
pre.config span { color: var(--soft); }
footer {
  margin-top: 84px; padding-top: 18px; border-top: 1px solid var(--line); color: var(--soft); font-size: 14px;
  overflow-wrap: anywhere;
}
@media (max-width: 760px) {
  main { padding: 32px 20px 48px; }
  h1 { font-size: 33px; }
  h2 { font-size: 22px; margin: 56px 0 18px; }
  .lead { font-size: 17px; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 22px 20px; margin-top: 32px; }
  .cards dd:not(.note) { font-size: 22px; }
  .figures, .two { grid-template-columns: minmax(0, 1fr); gap: 44px; }
  .frame.tall { height: 250px; }
  .sample { padding-left: 16px; }
  .images.four { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
  .num td, .num thead th { padding-left: 10px; }
  .num td:first-child { padding-left: 0; }
  .sample pre { font-size: 16px; }
}
@media print { details { display: none; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""

SCRIPT = """
for (const frame of document.querySelectorAll('.frame')) {
  const [x0, x1] = frame.dataset.x.split(' ').map(Number);
  const [y0, y1] = frame.dataset.y.split(' ').map(Number);
  const log = 'log' in frame.dataset;
  const value = v => { const f = 1 - v / 10000; return log ? y0 * Math.pow(y1 / y0, f) : y0 + f * (y1 - y0); };
  let lines = null, cursor = null, tip = null;
  const leave = () => { if (cursor) { cursor.remove(); tip.remove(); cursor = null; } };
  frame.addEventListener('pointermove', event => {
    lines ??= [...frame.querySelectorAll('path[data-name]')].map(path => [path.dataset.name,
      path.getAttribute('d').split(/[ML]/).slice(1).map(p => p.split(' ').map(n => parseInt(n)))]);
    const box = frame.getBoundingClientRect();
    const at = 10000 * (event.clientX - box.left) / box.width;
    if (at < -200 || at > 10200) return leave();
    if (!cursor) {
      cursor = document.createElement('span'); cursor.className = 'cursor';
      tip = document.createElement('span'); tip.className = 'tip';
      frame.append(cursor, tip);
    }
    const near = lines.map(([name, points]) => [name, points.reduce((a, b) =>
      Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)]);
    const x = near.reduce((a, b) => Math.abs(b[1][0] - at) < Math.abs(a[1][0] - at) ? b : a)[1][0];
    const step = p => Math.round(x0 + p / 10000 * (x1 - x0)).toLocaleString('en');
    const number = n => Math.abs(n) >= 10000 ? Math.round(n).toLocaleString('en') : String(Number(n.toPrecision(4)));
    tip.textContent = [frame.dataset.name + ' ' + step(x), ...near.map(([name, p]) => name + '  ' + number(value(p[1]))
      + (Math.abs(p[0] - x) > 60 ? '  (' + frame.dataset.name + ' ' + step(p[0]) + ')' : ''))].join('\\n');
    cursor.style.left = x / 100 + '%';
    tip.style.left = x < 5000 ? 'calc(' + x / 100 + '% + 12px)' : 'auto';
    tip.style.right = x < 5000 ? 'auto' : 'calc(' + (100 - x / 100) + '% + 12px)';
  });
  frame.addEventListener('pointerleave', leave);
}
"""
