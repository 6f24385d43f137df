// What tests ask of a page that a browser shows.
({
  // Of every text that is seen: how much it stands out from what it is drawn on, and the text.
  contrasts() {
    const numbers = (text) => (text.match(/[\d.]+/g) ?? []).map(Number);
    const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    const bright = (rgb) => rgb.map((x, k) => linear(x / 255) * [0.2126, 0.7152, 0.0722][k]).reduce((a, b) => a + b);
    const over = (top, alpha, below) => top.map((x, k) => alpha * x + (1 - alpha) * below[k]);
    const isSvg = (one) => one.namespaceURI.endsWith("svg");
    const ground = (one) => {
      const stack = [];
      for (let at = one; at; at = at.parentElement) {
        const box = isSvg(at) && [...at.children].find((child) => child !== one && (child.matches(".ground") || child.tagName === "circle"));
        const [r, g, b, alpha = 1] = numbers(box ? getComputedStyle(box).fill : getComputedStyle(at).backgroundColor);
        if (r !== undefined && alpha > 0) stack.push([[r, g, b], alpha]);
      }
      return stack.reverse().reduce((below, [top, alpha]) => over(top, alpha, below), [255, 255, 255]);
    };
    const found = [];
    for (const one of document.querySelectorAll(".explorer *")) {
      const own = [...one.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
      if (!own || one.closest("option, title, .away, :disabled, noscript") || !one.checkVisibility()) continue;
      const style = getComputedStyle(one);
      const [r, g, b, alpha = 1] = numbers(isSvg(one) ? style.fill : style.color);
      let seen = alpha;
      for (let at = one; at; at = at.parentElement) seen *= Number(getComputedStyle(at).opacity);
      const below = ground(one);
      const [x, y] = [bright(over([r, g, b], seen, below)), bright(below)];
      found.push([(Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05), one.textContent.slice(0, 40)]);
    }
    return found;
  },
  // Notes what has the focus: null where nothing has, "" if it looks other than without, else what.
  reached() {
    const one = document.activeElement;
    if (one === document.body) return null;
    const look = (element) => {
      if (!element) return "";
      const { outlineStyle, outlineWidth, stroke, strokeWidth, strokeOpacity, boxShadow } = getComputedStyle(element);
      return [outlineStyle !== "none" && parseFloat(outlineWidth) > 0, stroke, strokeWidth, strokeOpacity, boxShadow].join(" ");
    };
    const all = () => [one, one.querySelector(".ground"), one.querySelector(".ribbon"), one.closest("label")].map(look).join("; ");
    const focused = all();
    one.setAttribute("data-reached", "");
    one.blur();
    const without = all();
    one.focus();
    return without !== focused ? "" : one.outerHTML.slice(0, 200);
  },
  // What can be clicked, and never had the focus. Of radio buttons the arrow keys reach the other.
  missed() {
    return [...document.querySelectorAll("a[href], button, input, select, summary, [tabindex], [role=button]")]
      .filter((one) => !one.disabled && one.checkVisibility() && !one.hasAttribute("data-reached"))
      .filter((one) => one.type !== "radio" || one.checked)
      .map((one) => one.outerHTML.slice(0, 200));
  },
  // What of the head, the formula and the input lies beyond the right edge.
  outside(width) {
    return [...document.querySelectorAll(".explorer header *, .explorer .asked *, .input *")]
      .filter((one) => one.getBoundingClientRect().right > width + 1 && one.checkVisibility())
      .filter((one) => !one.closest("details:not([open]) .menu, option, .away"))
      .map((one) => `${one.className} ${one.textContent.slice(0, 40)}`);
  },
  // Texts of the network that lie over each other.
  overlapping() {
    const boxes = [...document.querySelectorAll(".network text")].map((one) => [one.textContent, one.getBoundingClientRect()]);
    const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
    return boxes.flatMap(([one, a], k) => boxes.slice(k + 1).filter(([, b]) => meet(a, b)).map(([other]) => `${one} | ${other}`));
  },
  // From now on counts how often the columns are drawn, and how many nodes there are in each frame.
  watch() {
    window.drawings = 0;
    window.frames = [];
    new MutationObserver((changes) => {
      window.drawings += changes.filter((one) => one.addedNodes.length).length;
    }).observe(document.querySelector(".columns"), { childList: true });
    const frame = () => {
      window.frames.push(document.querySelectorAll(".node").length);
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  },
})
