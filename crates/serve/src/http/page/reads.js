"use strict";
// What the model read: for the word under the pointer, the blocks that each layer and group of
// heads selected, drawn over the text they hold.

const words = (() => {
  const find = (id) => document.getElementById(id);
  let shown = null; // the turn whose text stands in the panel
  let spans = [];   // one for each block
  let at = null;    // the word that is looked at

  /// Adds text to an answer as a word that can be pointed at. Text and reads may come apart:
  /// what has no text yet waits for the next that has.
  function add(turn, box, text, reads) {
    const all = turn.words.reads;
    all.push(...reads);
    if (!text) return;
    const word = document.createElement("span");
    word.className = "word";
    word.textContent = text;
    word.dataset.read = all.length - 1;
    word.turn = turn;
    box.append(word);
  }

  function open(turn) {
    shown = turn;
    const first = turn.words.reads[0];
    find("context").hidden = false;
    const layers = first.layers.map((_, i) => new Option(i + 1, i));
    const most = Math.max(...first.layers.map((groups) => groups.length));
    const groups = Array.from({ length: most }, (_, i) => new Option(i + 1, i));
    find("layer").replaceChildren(new Option("all", ""), ...layers);
    find("group").replaceChildren(new Option("all", ""), ...groups);
    fill();
  }

  /// The text of prompt and answer, cut where the blocks are.
  function fill() {
    const { prompt, reads } = shown.words;
    const tokens = prompt.concat(reads.map((read) => read.token));
    const size = reads[0].block;
    spans = [];
    const all = document.createDocumentFragment();
    for (let start = 0; start < tokens.length; start += size) {
      const span = document.createElement("span");
      span.className = "block";
      span.textContent = tokens.slice(start, start + size).join("");
      spans.push(span);
      all.append(span);
    }
    shown.words.filled = tokens.length;
    find("blocks").replaceChildren(all);
  }

  /// How many of the chosen layers and groups selected each block, 0 to 1.
  function heats(read) {
    const heat = new Map();
    let count = 0;
    const layer = find("layer").value;
    const group = find("group").value;
    read.layers.forEach((groups, l) => groups.forEach((blocks, g) => {
      if ((layer !== "" && Number(layer) !== l) || (group !== "" && Number(group) !== g)) return;
      count += 1;
      for (const block of blocks) heat.set(block, (heat.get(block) ?? 0) + 1);
    }));
    for (const [block, n] of heat) heat.set(block, n / count);
    return heat;
  }

  function show(word, scroll) {
    const turn = word.turn;
    const read = turn.words.reads[word.dataset.read];
    if (!read?.layers.length) return;
    if (shown !== turn) open(turn);
    else if (turn.words.filled !== turn.words.prompt.length + turn.words.reads.length) fill();
    at?.classList.remove("at");
    at = word;
    word.classList.add("at");
    const heat = heats(read);
    spans.forEach((span, i) => span.style.setProperty("--warm", heat.get(i) ?? 0));
    const last = Math.floor(read.position / read.block) + 1;
    find("legend").textContent = `For “${word.textContent.trim() || "␣"}”: ${heat.size} of ${last} blocks of ` +
      `${read.block} tokens selected by ${find("layer").value === "" ? "some layer" : `layer ${Number(find("layer").value) + 1}`}. ` +
      "Darker: by more. Summaries of all and the nearest words are read besides.";
    draw(read, last);
    if (!scroll) return;
    const warmest = [...heat].sort((a, b) => b[1] - a[1] || b[0] - a[0])[0];
    if (warmest) spans[warmest[0]]?.scrollIntoView({ block: "center" });
  }

  /// Layers and groups from top to bottom, blocks from left to right.
  function draw(read, blocks) {
    const rows = read.layers.flat();
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(blocks, 1);
    canvas.height = Math.max(rows.length, 1);
    canvas.style.height = `${Math.min(rows.length * 4, 160)}px`;
    const pen = canvas.getContext("2d");
    pen.fillStyle = getComputedStyle(document.body).getPropertyValue("color");
    rows.forEach((selected, y) => selected.forEach((x) => pen.fillRect(x, y, 1, 1)));
    find("layers").replaceChildren(canvas);
  }

  function close() {
    find("context").hidden = true;
    at?.classList.remove("at");
    shown = at = null;
  }

  const word = (event) => event.target.closest?.(".word");
  find("talk").addEventListener("pointerover", (event) => word(event) && show(word(event), false));
  find("talk").addEventListener("click", (event) => word(event) && show(word(event), true));
  document.addEventListener("keydown", (event) => {
    if (!at || /^(TEXTAREA|INPUT|SELECT)$/.test(event.target.tagName)) return;
    if (event.key === "Escape") close();
    const next = { ArrowLeft: at?.previousSibling, ArrowRight: at?.nextSibling }[event.key];
    if (next) {
      event.preventDefault();
      show(next, true);
    }
  });
  for (const id of ["layer", "group"]) find(id).onchange = () => at && show(at, true);
  find("close-context").onclick = close;
  return { add, close };
})();
