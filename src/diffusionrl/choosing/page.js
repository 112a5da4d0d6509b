"use strict";
(() => {
  const SETTLE = 150; // milliseconds: the second half of a double click is no choice among the next images
  const GAP = 12, FINGER = 96; // pixels
  const element = (id) => document.getElementById(id);
  const stage = element("stage");
  let state = { shown: [] };
  let busy = false, finished = false;
  let alarm = { text: "", until: 0 };

  // What is shown

  const tile = ([number], place) => {
    const button = document.createElement("button");
    const [image, key] = [document.createElement("img"), document.createElement("i")];
    button.className = "choice";
    button.setAttribute("aria-label", `image ${place + 1}`);
    if (state.several) button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => take(place));
    image.alt = "";
    image.draggable = false;
    image.src = `image/${number}/${place}`;
    key.textContent = place + 1;
    button.append(image, key);
    return button;
  };

  const show = async () => {
    const [now, next] = state.shown;
    const tiles = Array.from({ length: now ? now[1] : 0 }, (_, place) => tile(now, place));
    stage.classList.remove("ready");
    stage.replaceChildren(...tiles);
    stage.scrollTop = 0;
    fit();
    await Promise.all(tiles.map((each) => each.firstChild.decode().catch(() => each.replaceChildren("This image does not load"))));
    fit();
    for (let place = 0; next && place < next[1]; place++) new Image().src = `image/${next[0]}/${place}`;
    setTimeout(() => { if (tiles.length && tiles[0].isConnected) stage.classList.add("ready"); }, SETTLE);
  };

  // As large as all fit; where that is smaller than a finger, there is something to scroll.
  const fit = () => {
    const image = stage.querySelector("img");
    const aspect = image && image.naturalWidth ? image.naturalWidth / image.naturalHeight : 1;
    const count = stage.children.length, [width, height] = [stage.clientWidth - 8, stage.clientHeight - 8];
    let best = [1, 0, 0];
    for (let columns = 1; columns <= count; columns++) {
      const rows = Math.ceil(count / columns), across = (width - GAP * (columns - 1)) / columns;
      const side = Math.min(across, Math.max(FINGER, ((height - GAP * (rows - 1)) / rows) * aspect));
      const worth = side - (rows * columns - count) / 100; // among equals, the fewest empty places
      if (worth >= best[2]) best = [columns, side, worth];
    }
    stage.style.gridTemplateColumns = `repeat(${best[0]}, ${Math.floor(best[1])}px)`;
    stage.style.gridAutoRows = `${Math.floor(best[1] / aspect)}px`;
  };

  const liked = () => [...stage.children].flatMap((each, place) => (each.getAttribute("aria-pressed") === "true" ? [place] : []));

  const waiting = () => {
    if (state.shown.length) return "";
    if (finished) return "Finished. You can close this window.";
    if (state.several) return "The program is at work. Its next images come by themselves.";
    return state.ended ? "That was all of them." : "Drawing images …";
  };

  const tell = () => {
    const seconds = state.left === null ? "" : String(Math.floor(state.left % 60)).padStart(2, "0");
    const parts = [
      state.several && state.total < 2 ? "" : `${state.done}${state.total === null ? "" : ` of ${state.total}`} judged`,
      state.paused ? "paused" : seconds && `${Math.floor(state.left / 60)}:${seconds} left`,
    ];
    const alarmed = Date.now() < alarm.until, any = state.shown.length > 0;
    element("prompt").textContent = state.prompt || "\u00a0";
    element("progress").textContent = parts.filter(Boolean).join(" · ");
    element("bar").value = state.total ? state.done / state.total : 0;
    element("note").textContent = alarmed ? alarm.text : waiting();
    element("note").className = alarmed ? "alarm" : "";
    element("about").textContent = state.about;
    const one = any && state.shown[0][1] === 2 ? "better one: ← → or" : "best one:";
    const hint = state.several ? "Tap those you like: number keys, Enter when done" : `Tap the ${one} number keys · S can’t say · U undo`;
    element("hint").textContent = any ? hint : "";
    element("undo").disabled = !state.done || finished;
    element("pause").hidden = !state.several;
    element("pause").textContent = state.paused ? "Go on" : "Pause";
    element("skip").hidden = !any;
    element("done").hidden = !state.several || !any;
    element("done").textContent = liked().length ? `Done (${liked().length})` : "None of them";
    element("finish").hidden = state.several || finished;
    element("finish").className = state.ended ? "main" : "";
    document.title = any ? `${state.several ? "● " : ""}${state.prompt.slice(0, 60)}` : "Choose";
  };

  const update = (next) => {
    const same = JSON.stringify(state.shown) === JSON.stringify(next.shown);
    state = next;
    if (!same) show();
    tell();
  };

  // What is asked of the program

  const ask = async (path, options) => {
    try {
      const answer = await fetch(path, { cache: "no-store", ...options });
      const body = await answer.json();
      if (answer.status === 409) alarm = { text: "This was judged in another window.", until: Date.now() + 4000 };
      if (body.shown) return body;
      alarm = { text: body.error, until: Date.now() + 10000 };
    } catch { // there was no answer
      const more = state.several ? "" : " What was chosen is kept: start it again to go on, at a new address.";
      alarm = { text: `The program has ended.${more}`, until: Date.now() + 2000 };
    }
    return state;
  };

  const act = async (action, chosen) => {
    if (busy) return;
    busy = true;
    const body = JSON.stringify({ round: state.shown.length ? state.shown[0][0] : null, chosen });
    const found = await ask(action, { method: "POST", headers: { "Content-Type": "application/json" }, body });
    finished = action === "finish" && found !== state;
    update(finished ? { ...found, shown: [], prompt: "" } : found);
    busy = false;
  };

  const take = (place) => {
    const button = stage.children[place];
    if (!stage.classList.contains("ready") || !button || !button.querySelector("img")) return;
    if (!state.several) return act("choose", [place]);
    button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
    tell();
  };
  const answer = (chosen) => { if (stage.classList.contains("ready")) act("choose", chosen); };
  const undo = () => { if (!element("undo").disabled) act("undo", null); };
  const keys = {
    ArrowLeft: () => { if (stage.children.length === 2) take(0); },
    ArrowRight: () => { if (stage.children.length === 2) take(1); },
    Enter: () => answer(liked()),
    Backspace: undo,
    u: undo,
    s: () => answer(null),
    p: () => { if (state.several) act("pause", null); },
  };
  document.addEventListener("keydown", (event) => {
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const native = key === "Enter" && (!state.several || event.target.closest("footer"));
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || native) return;
    if (/^[1-9]$/.test(key)) take(+key - 1);
    else if (keys[key]) keys[key]();
    else return;
    event.preventDefault();
  });
  for (const [id, key] of [["undo", "u"], ["pause", "p"], ["skip", "s"], ["done", "Enter"]]) element(id).addEventListener("click", keys[key]);
  element("finish").addEventListener("click", () => act("finish", null));
  addEventListener("resize", fit);
  const look = async () => {
    if (busy || finished) return;
    const found = await ask("state");
    if (!busy && !finished) update(found);
  };
  setInterval(look, 1000);
  document.addEventListener("visibilitychange", look);
  look();
})();
