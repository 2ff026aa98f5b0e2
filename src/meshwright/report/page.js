"use strict";
// The values under the pointer, in every chart; and a count of what was drawn, which the tests read.
(() => {
  const root = document.documentElement;
  let errors = 0;
  addEventListener("error", () => { errors += 1; });

  const svgNode = (name, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };

  const number = (value) => (value === null ? "not finite" : String(Number(value.toPrecision(4))));

  const watch = (svg) => {
    const { frame: [left, right, top, bottom, low, high], unit, series } = JSON.parse(svg.dataset.hover);
    const line = svg.appendChild(svgNode("line", { class: "pointer", y1: top, y2: bottom, visibility: "hidden" }));
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    svg.parentElement.appendChild(tip);

    const leave = () => { tip.hidden = true; line.setAttribute("visibility", "hidden"); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      if (point.x < left || point.x > right) { leave(); return; }
      const wanted = low + (point.x - left) / (right - left) * (high - low);
      const nearest = (xs) => xs.reduce((best, x, i) => (Math.abs(x - wanted) < Math.abs(xs[best] - wanted) ? i : best), 0);
      const step = series[0].x[nearest(series[0].x)];
      const close = 0.012 * (high - low);
      const at = left + (step - low) / (high - low) * (right - left);
      line.setAttribute("x1", at);
      line.setAttribute("x2", at);
      line.setAttribute("visibility", "visible");
      const head = document.createElement("b");
      head.textContent = `step ${step}`;
      const rows = series.flatMap((one) => {
        const i = nearest(one.x);
        if (one !== series[0] && Math.abs(one.x[i] - step) > close) return [];
        const row = document.createElement("span");
        row.className = `c-${one.colour}`;
        row.append(Object.assign(document.createElement("i"), { className: "key box" }));
        row.append(`${one.name} ${number(one.y[i])}${unit ? ` ${unit}` : ""}`);
        return [row];
      });
      tip.replaceChildren(head, ...rows);
      tip.hidden = false;
      const box = svg.getBoundingClientRect();
      const around = svg.parentElement.getBoundingClientRect();
      const x = box.left - around.left + at / svg.viewBox.baseVal.width * box.width;
      const flip = x > around.width / 2;
      tip.style.left = flip ? "auto" : `${x + 12}px`;
      tip.style.right = flip ? `${around.width - x + 12}px` : "auto";
    });
  };

  addEventListener("load", () => {
    for (const svg of document.querySelectorAll("svg[data-hover]")) watch(svg);
    const drawn = [...document.querySelectorAll("svg, img")];
    const empty = drawn.filter((node) => {
      const { width, height } = node.getBoundingClientRect();
      return !node.closest("details:not([open])") && !(width > 0 && height > 0 && node.naturalWidth !== 0);
    });
    Object.assign(root.dataset, {
      svg: drawn.filter((node) => node.localName === "svg").length,
      img: drawn.filter((node) => node.localName === "img").length,
      empty: empty.length,
      wider: Math.max(0, root.scrollWidth - root.clientWidth),
      errors,
    });
  });
})();
