"use strict";
(() => {
  const element = (id) => document.getElementById(id);
  const stage = element("stage");
  const SETTLE = 150; // milliseconds: the second half of a double click is no choice among the next images
  let state = {};
  let said = ""; // the state as text
  let busy = false;
  let alarm = { text: "", until: 0 };
  let finished = false;

  const round = () => (state.shown.length ? state.shown[0][0] : null);
  const url = ([number], place) => `image/${number}/${place}`;
  const liked = () => [...stage.children].flatMap((each, place) => (each.getAttribute("aria-pressed") === "true" ? [place] : []));

  // What is shown

  const tile = (shown, place) => {
    const button = document.createElement("button");
    button.className = "choice";
    button.setAttribute("aria-label", `image ${place + 1}`);
    if (state.several) button.setAttribute("aria-pressed", "false");
    const image = document.createElement("img");
    image.alt = "";
    image.draggable = false;
    image.src = url(shown, place);
    const key = document.createElement("i");
    key.textContent = place + 1;
    button.append(image, key);
    button.addEventListener("click", () => take(place));
    return { button, loaded: image.decode().catch(() => {
      button.classList.add("broken");
      image.replaceWith("This image does not load");
    }) };
  };

  const show = async () => {
    stage.classList.remove("ready");
    const shown = state.shown[0];
    const tiles = shown ? Array.from({ length: shown[1] }, (_, place) => tile(shown, place)) : [];
    stage.replaceChildren(...tiles.map((each) => each.button));
    stage.scrollTop = 0;
    fit();
    const next = state.shown[1];
    await Promise.all(tiles.map((each) => each.loaded));
    fit();
    if (next) for (let place = 0; place < next[1]; place++) new Image().src = url(next, place);
    setTimeout(() => { if (tiles.length && tiles[0].button.isConnected) stage.classList.add("ready"); }, SETTLE);
  };

  // As large as they fit; not smaller than a finger, whatever there is to scroll.
  const fit = () => {
    const count = stage.children.length;
    if (!count) return;
    const first = stage.querySelector("img");
    const aspect = first && first.naturalWidth ? first.naturalWidth / first.naturalHeight : 1;
    const [width, height] = [stage.clientWidth - 8, stage.clientHeight - 8];
    const sizes = Array.from({ length: count }, (_, i) => {
      const [columns, rows] = [i + 1, Math.ceil(count / (i + 1))];
      const across = (width - 12 * (columns - 1)) / columns;
      return [columns, Math.min(across, ((height - 12 * (rows - 1)) / rows) * aspect), across];
    });
    let [columns, side] = sizes.reduce((best, each) => (each[1] > best[1] ? each : best));
    if (side < 96) {
      const enough = sizes.filter((each) => each[2] >= 96);
      [columns, , side] = enough.length ? enough[enough.length - 1] : sizes[0];
    }
    stage.style.gridTemplateColumns = `repeat(${columns}, ${Math.floor(side)}px)`;
    stage.style.gridAutoRows = `${Math.floor(side / aspect)}px`;
  };

  const tell = () => {
    if (!state.shown) return;
    const count = `${state.done}${state.total === null ? "" : ` of ${state.total}`} judged`;
    const left = state.left == null ? "" : `${Math.floor(state.left / 60)}:${String(Math.floor(state.left % 60)).padStart(2, "0")} left`;
    const parts = [!state.several || state.total > 1 ? count : "", state.paused ? "paused" : left];
    element("prompt").textContent = state.prompt || "\u00a0";
    element("progress").textContent = parts.filter(Boolean).join(" · ");
    element("bar").value = state.total ? state.done / state.total : 0;
    const alarmed = Date.now() < alarm.until;
    element("note").textContent = alarmed ? alarm.text : state.note;
    element("note").className = alarmed ? "alarm" : "";
    element("kept").textContent = state.kept;
    element("undo").disabled = !state.undo;
    element("skip").hidden = !state.shown.length;
    element("done").hidden = !state.several || !state.shown.length;
    element("done").textContent = liked().length ? `Done (${liked().length})` : "None of them";
    element("pause").hidden = state.paused === undefined;
    element("pause").textContent = state.paused ? "Go on" : "Pause";
    element("finish").hidden = state.several || (!state.ended && state.total !== null);
    element("hint").textContent = !state.shown.length ? "" : state.several
      ? "Tap those you like: number keys, Enter when done" : "Tap the better one: ← → or number keys · S can’t say · U undo";
    document.title = state.shown.length ? `${state.several ? "● " : ""}${state.prompt.slice(0, 60)}` : "Choose";
  };

  const update = (next) => {
    const text = JSON.stringify({ ...next, left: 0 });
    const [before, several] = [JSON.stringify(state.shown), state.several];
    const changed = text !== said;
    [state, said] = [next, text];
    if (changed && (before !== JSON.stringify(next.shown) || several !== next.several)) show();
    tell();
  };

  // What is asked of the program

  const ask = async (path, options) => {
    const answer = await fetch(path, { cache: "no-store", ...options });
    const body = await answer.json();
    if (answer.status !== 200 && answer.status !== 409) throw new Error(body.error);
    alarm = answer.status === 409 ? { text: "This was judged in another window.", until: Date.now() + 4000 } : alarm;
    return body;
  };

  const look = async () => {
    if (busy || finished) return;
    try {
      const found = await ask("state");
      if (!busy) update(found);
    } catch (error) {
      lose(error);
    }
  };

  const lose = (error) => {
    const gone = error instanceof TypeError; // there was no answer
    const more = state.several ? "" : " What was chosen is kept: start it again to go on, at a new address.";
    const text = gone ? `The program has ended.${more}` : error.message;
    alarm = { text, until: Date.now() + (gone ? 2000 : 10000) };
    tell();
  };

  const act = async (action, chosen) => {
    if (busy) return;
    busy = true;
    try {
      const body = JSON.stringify({ round: round(), chosen });
      update(await ask(action, { method: "POST", headers: { "Content-Type": "application/json" }, body }));
      finished = action === "finish";
      if (finished) update({ ...state, shown: [], prompt: "", undo: false, total: state.done, ended: false, note: "Finished. You can close this window." });
    } catch (error) {
      lose(error);
    }
    busy = false;
  };

  const take = (place) => {
    const button = stage.children[place];
    if (!button || !stage.classList.contains("ready") || button.classList.contains("broken")) return;
    if (!state.several) return act("choose", [place]);
    button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
    tell();
  };
  const send = (chosen) => { if (stage.classList.contains("ready")) act("choose", chosen); };

  const keys = {
    ArrowLeft: () => { if (stage.children.length === 2) take(0); },
    ArrowRight: () => { if (stage.children.length === 2) take(1); },
    Enter: () => { if (state.several && state.shown.length) send(liked()); },
    s: () => send(null),
    u: () => { if (state.undo) act("undo", null); },
    Backspace: () => { if (state.undo) act("undo", null); },
    p: () => { if (state.paused !== undefined) act("pause", null); },
  };
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || !state.shown) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (/^[1-9]$/.test(key)) take(+key - 1);
    else if (keys[key] && !(key === "Enter" && (!state.several || event.target.closest("footer")))) keys[key]();
    else return;
    event.preventDefault();
  });
  element("undo").addEventListener("click", keys.u);
  element("skip").addEventListener("click", keys.s);
  element("done").addEventListener("click", keys.Enter);
  element("pause").addEventListener("click", keys.p);
  element("finish").addEventListener("click", () => act("finish", null));
  addEventListener("resize", fit);
  setInterval(look, 1000);
  look();
})();
