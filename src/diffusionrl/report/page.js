"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tiles = [...document.querySelectorAll(".tile[data-cell]")];
  const slider = document.getElementById("stop");
  const label = document.getElementById("label");
  const play = document.getElementById("play");
  const closer = document.getElementById("closer");

  // What the page opens with is in its tiles, everything else in the data: each image is in the page once.
  for (const image of document.querySelectorAll("img[data-image]")) {
    if (image.dataset.image >= 0) data.images[image.dataset.image] = image.src;
  }

  const show = (image, number) => {
    if (number < 0) image.removeAttribute("src");
    else image.src = data.images[number];
    const sound = image.closest("figure")?.querySelector("audio");
    if (!sound) return;
    if (number in data.sounds) sound.src = data.sounds[number];
    else sound.removeAttribute("src");
  };
  const judge = (element, [, , change, better]) => {
    element.textContent = change;
    element.className = better === null ? "" : better ? "up" : "down";
  };

  const marks = [...document.querySelectorAll(".chart")].map((chart) => ({
    line: chart.querySelector(".mark"),
    places: JSON.parse(chart.dataset.marks),
  }));
  const place = (line, x) => {
    line.setAttribute("visibility", "visible");
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
  };

  const go = (stop) => {
    label.textContent = data.labels[stop];
    slider.value = stop;
    slider.setAttribute("aria-valuetext", data.labels[stop]);
    for (const tile of tiles) {
      const cell = data.cells[stop][tile.dataset.cell];
      show(tile.querySelector("img"), cell[0]);
      tile.querySelector(".score b").textContent = cell[1];
      judge(tile.querySelector(".score i"), cell);
    }
    for (const { line, places } of marks) if (places.length) place(line, places[stop]);
  };

  let timer = null;
  const halt = () => {
    clearInterval(timer);
    timer = null;
    play.firstElementChild.textContent = "▶";
  };
  if (slider) {
    slider.addEventListener("input", () => {
      halt();
      go(+slider.value);
    });
    play.addEventListener("click", () => {
      if (timer !== null) return halt();
      const last = data.labels.length - 1;
      go(+slider.value === last ? 0 : +slider.value);
      play.firstElementChild.textContent = "❚❚";
      timer = setInterval(() => {
        if (+slider.value < last) go(+slider.value + 1);
        if (+slider.value === last) halt();
      }, 700);
    });
    go(data.labels.length - 1);
  }

  const unfold = document.getElementById("unfold");
  unfold?.addEventListener("click", () => {
    document.getElementById("tiles").classList.remove("folded");
    unfold.remove();
  });

  // A tile's stages, one beside the other.
  for (const tile of tiles) {
    tile.querySelector("button").addEventListener("click", () => {
      closer.querySelector(".prompt").textContent = tile.querySelector("button").title;
      closer.querySelector(".film").replaceChildren(
        ...data.cells.map((cells, stop) => {
          const cell = cells[tile.dataset.cell];
          const figure = document.createElement("figure");
          const image = document.createElement("img");
          const caption = document.createElement("figcaption");
          const change = document.createElement("i");
          show(image, cell[0]);
          judge(change, cell);
          caption.append(data.labels[stop], document.createElement("br"), `${cell[1]} `, change);
          figure.append(image, caption);
          return figure;
        }),
      );
      closer.showModal();
    });
  }
  closer.addEventListener("click", (event) => {
    if (event.target === closer) closer.close();
  });

  // The values under the pointer.
  for (const chart of document.querySelectorAll(".chart")) {
    const lines = JSON.parse(chart.dataset.lines);
    const svg = chart.querySelector("svg");
    const cursor = chart.querySelector(".cursor");
    const reading = chart.querySelector(".reading");
    const nearest = (points, at) =>
      points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best));
    const leave = () => {
      cursor.setAttribute("visibility", "hidden");
      reading.textContent = "";
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const found = lines.map(([name, points]) => [name, nearest(points, at)]);
      const [px, x] = nearest(found.map((each) => each[1]), at);
      place(cursor, px);
      const round = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });
      const values = found.filter(([, point]) => Math.abs(point[0] - px) < 10).map(([name, point]) => `${name} ${round(point[2])}`);
      reading.textContent = `${x.toLocaleString("en")} ${chart.dataset.x}: ${values.join(", ")}`;
    });
    svg.addEventListener("pointerleave", leave);
  }
})();
