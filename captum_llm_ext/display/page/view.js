(() => {
  const palettes = {{palettes}};

  // IEEE 754 half precision
  const half = (bits) => {
    const exponent = (bits >> 10) & 31, fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
  };

  const decode = (text) => {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const words = new DataView(bytes.buffer);
    return Array.from({ length: bytes.length / 2 }, (_, i) => half(words.getUint16(2 * i, true)));
  };

  const format = (value, scale) => {
    if (!Number.isFinite(value)) return String(value);
    if (scale.decimals === null) return value.toExponential(1);
    const text = value.toFixed(scale.decimals);
    return Number(text) ? text : text.replace("-", "");
  };

  const shade = (token, value, scale) => {
    const share = Math.max(-1, Math.min(1, value / scale.limit));
    const palette = palettes[scale.signed ? "signed" : "positive"];
    const position = scale.signed ? (share + 1) / 2 : Math.max(0, share);
    const finite = Number.isFinite(value);
    const level = Math.round(position * (palette.length - 1));
    [token.style.background, token.style.color] = finite ? palette[level] : ["#d3d3d3", "black"];
    token.classList.toggle("negative", share <= -{{faintest}});
    token.classList.toggle("beyond", finite && Math.abs(value) > 1.001 * scale.limit);
    token.title = format(value, scale);
  };

  const start = (root) => {
    const views = JSON.parse(root.dataset.views);
    const find = (selector) => root.querySelector(selector);
    const inputs = [...find(".inputs").children], outputs = [...find(".outputs").children];
    const slider = find(".layers input");
    let view = views[0], row = 0, pinned = 0;

    const isolated = (token) => `\u2068${token.textContent.trim()}\u2069`;

    const describe = (token) => {
      const to = row ? isolated(outputs[row]) : "the whole output";
      const value = token ? `, of ${isolated(token)}: ${token.title}` : "";
      find(".readout").textContent = `Attribution to ${to}${value}`;
    };

    const explain = (scale) => {
      find(".low").textContent = scale.signed ? format(-scale.limit, scale) : "0";
      find(".high").textContent = format(scale.limit, scale);
      find(".bar").className = `bar ${scale.signed ? "signed" : "positive"}`;
      find(".sign").hidden = !scale.signed;
      find(".cut").hidden = Math.abs(scale.peak) <= scale.limit;
      find(".peak").textContent = format(scale.peak, scale);
    };

    const paint = (index) => {
      view.decoded ||= decode(view.values);
      const stored = (index + 1) * inputs.length <= view.decoded.length;
      row = stored ? index : 0;
      const scale = row ? view.tokens : view.sequence;
      const values = view.decoded.slice(row * inputs.length);
      inputs.forEach((token, i) => shade(token, view.unit * values[i], scale));
      outputs.forEach((token, i) => {
        token.classList.toggle("shown", i === row);
        token.setAttribute("aria-pressed", i === pinned);
      });
      explain(scale);
      describe();
    };

    const pin = (index) => {
      pinned = pinned === index ? 0 : index;
      paint(pinned);
    };

    outputs.forEach((token, index) => {
      token.tabIndex = 0;
      token.setAttribute("role", "button");
      token.addEventListener("pointerenter", () => paint(index));
      token.addEventListener("pointerleave", () => paint(pinned));
      token.addEventListener("focus", () => token.matches(":focus-visible") && paint(index));
      token.addEventListener("blur", () => paint(pinned));
      token.addEventListener("click", () => pin(index));
      token.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        pin(index);
      });
    });
    inputs.forEach((token) => token.addEventListener("pointerenter", () => describe(token)));
    find(".inputs").addEventListener("pointerleave", () => describe());
    slider.addEventListener("input", () => {
      view = views[slider.value];
      find("output").textContent = view.name;
      paint(pinned);
    });
    slider.value = 0; // browsers restore it on reload
    find("output").textContent = view.name;
    find(".layers").hidden = views.length < 2;
    paint(0);
  };

  for (const root of document.querySelectorAll(".{{scope}}:not([data-ready])")) {
    root.dataset.ready = "";
    start(root);
  }
})();
