"use strict";
// Ask the watcher for what has changed, and put it in its place. Nothing else is loaded.
(() => {
  const NEWS_MS = 2000, HIDDEN_MS = 10000;
  const have = {};
  const folded = (part) => [...part.querySelectorAll("details")].map((one) => one.open);

  function show(news) {
    document.title = news.title;
    document.body.dataset.state = news.state;
    document.querySelector("link[rel=icon]").href = news.icon;
    for (const [name, part] of Object.entries(news.parts)) {
      const place = document.getElementById(name), open = folded(place);
      place.innerHTML = part.html;
      place.querySelectorAll("details").forEach((one, i) => { one.open = open[i] ?? one.open; });
      have[name] = part.version;
    }
  }

  async function look() {
    try {
      const reply = await fetch("news?" + new URLSearchParams(have), { cache: "no-store" });
      if (!reply.ok) throw new Error(reply.status);
      show(await reply.json());
      delete document.body.dataset.lost;
    } catch {
      document.body.dataset.lost = "yes";
    }
    setTimeout(look, document.hidden ? HIDDEN_MS : NEWS_MS);
  }

  look();
})();
