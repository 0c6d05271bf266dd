"use strict";
// A conversation with the server this page came from. No library, nothing from elsewhere.

const $ = (id) => document.getElementById(id);
const LONG = 4000;      // characters of a message past which it gets a box of its own
const STORE = "tercet"; // where this browser keeps conversation and settings
const FIELDS = ["system", "temperature", "top_p", "max_tokens", "seed"];

let turns = [];         // {role, content, element, words?}
let models = [];
let hasTemplate = true;
let running = null;     // the AbortController of the answer being written
let saving = 0;

// ---- what survives a reload

function save() {
  clearTimeout(saving);
  saving = setTimeout(() => {
    const kept = { turns: turns.map(({ role, content }) => ({ role, content })), settings: {} };
    for (const name of FIELDS) kept.settings[name] = $(name).value;
    kept.model = $("model").value;
    kept.draft = $("input").value.length < 100000 ? $("input").value : "";
    kept.reads = $("reads").getAttribute("aria-pressed") === "true";
    try {
      localStorage.setItem(STORE, JSON.stringify(kept));
    } catch {
      // Too large for this browser's store: the settings at least.
      try { localStorage.setItem(STORE, JSON.stringify({ ...kept, turns: [], draft: "" })); } catch { /* none at all */ }
    }
    try { sessionStorage.setItem(STORE, $("key").value); } catch { /* kept in this page alone */ }
  }, 200);
}

function restore() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(STORE)) || {};
    $("key").value = sessionStorage.getItem(STORE) || "";
  } catch { /* nothing, or nothing readable */ }
  for (const name of FIELDS) $(name).value = kept.settings?.[name] ?? "";
  $("input").value = kept.draft ?? "";
  $("reads").setAttribute("aria-pressed", String(Boolean(kept.reads)));
  for (const turn of Array.isArray(kept.turns) ? kept.turns : []) {
    if (typeof turn?.content === "string") add(turn.role === "user" ? "user" : "assistant", turn.content);
  }
  return kept.model;
}

// ---- the conversation on the page

function add(role, content) {
  $("empty").hidden = true;
  const element = document.createElement("article");
  element.className = `turn ${role}`;
  const who = document.createElement("div");
  who.className = "who";
  who.textContent = role === "user" ? "You" : "Model";
  const text = document.createElement("div");
  text.className = content.length > LONG ? "text long" : "text";
  if (content.length > LONG) text.tabIndex = 0;
  text.textContent = content;
  element.append(who, text);
  $("talk").append(element);
  const turn = { role, content, element };
  turns.push(turn);
  toEnd(true);
  return turn;
}

function toEnd(always) {
  const talk = $("talk");
  if (always || talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120) talk.scrollTop = talk.scrollHeight;
}

function status(text) {
  $("status").textContent = text;
}

function notice(text, action, label) {
  $("notice").hidden = !text;
  $("notice").textContent = text || "";
  if (action) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.onclick = () => { notice(""); action(); };
    $("notice").append(button);
  }
}

function progress(share) {
  $("progress").hidden = share === null;
  if (share !== null) $("progress").value = share;
}

// ---- the server

function ask(path, body, signal) {
  const headers = {};
  if (body) headers["content-type"] = "application/json";
  if ($("key").value) headers.authorization = `Bearer ${$("key").value}`;
  return fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
}

/// What the server says of an answer that is none.
async function complaint(response) {
  let message = `status ${response.status}`;
  try { message = (await response.json()).error.message; } catch { /* not ours */ }
  return message;
}

async function connect(wanted) {
  for (let tries = 0; ; tries++) {
    try {
      const response = await ask("v1/models");
      if (response.ok) {
        models = (await response.json()).data;
        break;
      }
      const message = await complaint(response);
      if (response.status === 401) {
        status("A key is needed: see Settings.");
        $("settings").showModal();
        $("key").focus();
        return;
      }
      status(response.status === 503 ? `${message}…` : message);
    } catch {
      status("No answer from the server; trying again…");
    }
    await new Promise((done) => setTimeout(done, Math.min(500 * 2 ** tries, 5000)));
  }
  const select = $("model");
  select.replaceChildren(...models.map((model) => new Option(model.id)));
  if (models.some((model) => model.id === wanted)) select.value = wanted;
  select.disabled = false;
  try { hasTemplate = (await (await ask("tokenizer_info")).json()).has_chat_template; } catch { /* asked again by the first answer */ }
  chosen();
  status(hasTemplate ? "Ready." : "Ready. This model continues text; it was not taught to chat.");
}

function chosen() {
  $("reads").hidden = !models.find((model) => model.id === $("model").value)?.sparse;
}

/// The request for the next turn.
function request() {
  const body = { model: $("model").value, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  if (!$("reads").hidden && $("reads").getAttribute("aria-pressed") === "true") body.return_reads = true;
  const said = turns.map(({ role, content }) => ({ role, content }));
  if (hasTemplate) {
    const system = $("system").value.trim();
    body.messages = system ? [{ role: "system", content: system }, ...said] : said;
    return ["v1/chat/completions", body];
  }
  body.prompt = $("system").value + said.map((turn) => turn.content).join("");
  if (!body.max_tokens) body.max_tokens = 256;
  return ["v1/completions", body];
}

/// Lines of a stream of server-sent events, as they come.
async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts;
  }
}

async function answer() {
  if (running) return;
  running = new AbortController();
  $("send").textContent = "Stop";
  notice("");
  progress(null);
  status("Sending…");
  const [path, body] = request();
  const turn = add("assistant", "");
  turn.element.classList.add("writing");
  const asked = performance.now();
  const told = { first: 0, tokens: 0, prompt: 0, finish: null, complete: false };
  let failure = null;
  try {
    const response = await ask(path, body, running.signal);
    if (!response.ok) {
      const wait = response.headers.get("retry-after");
      throw Object.assign(new Error(await complaint(response)), { said: true, status: response.status, wait });
    }
    for await (const line of lines(response)) take(turn, line, told, asked);
    if (!told.complete) throw new Error("ended early");
  } catch (error) {
    failure = error;
  }
  flush(turn);
  turn.element.classList.remove("writing");
  const stopped = running.signal.aborted;
  running = null;
  $("send").textContent = "Send";
  progress(null);
  if (!turn.content) {
    turn.element.remove();
    turns.pop();
  }
  if (failure && !stopped) {
    const again = () => {
      // What came of it is written anew.
      if (turn.content && turns.at(-1) === turn) {
        turn.element.remove();
        turns.pop();
      }
      answer();
    };
    const text = failure.said ? failure.message : "The server went away before the answer was complete.";
    notice(text, again, "Try again");
    status("");
    if (failure.status === 401) $("settings").showModal();
  } else {
    status(figures(told, stopped ? "stopped" : told.finish === "length" ? "cut at the limit of tokens" : ""));
  }
  save();
  $("input").focus();
}

function figures(told, why) {
  const seconds = (performance.now() - told.first) / 1000;
  const rate = told.tokens > 1 && seconds > 0 ? `${((told.tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  return [`${told.tokens} tokens`, rate, told.prompt ? `prompt ${told.prompt}` : "", why].filter(Boolean).join(" · ");
}

/// One line of the stream.
function take(turn, line, told, asked) {
  const read = /^: prefill (\d+)\/(\d+)/.exec(line);
  if (read) {
    progress(read[1] / read[2]);
    status(`Reading the prompt: ${read[1]} of ${read[2]} tokens`);
    return;
  }
  const queued = /^: queued (\d+)/.exec(line);
  if (queued) status(queued[1] === "0" ? "Waiting for a place…" : `Waiting behind ${queued[1]} others…`);
  if (!line.startsWith("data: ")) return;
  const data = line.slice(6);
  if (data === "[DONE]") {
    told.complete = true;
    return;
  }
  const chunk = JSON.parse(data);
  if (chunk.error) throw Object.assign(new Error(chunk.error.message), { said: true });
  if (chunk.usage) {
    told.tokens = chunk.usage.completion_tokens;
    told.prompt = chunk.usage.prompt_tokens;
  }
  const choice = chunk.choices[0];
  if (!choice) return;
  if (choice.prompt_tokens) turn.words = { prompt: choice.prompt_tokens, reads: [] };
  const text = choice.delta ? choice.delta.content : choice.text;
  for (const call of choice.delta?.tool_calls ?? []) write(turn, `${call.function.name}(${call.function.arguments})`);
  if (choice.finish_reason) told.finish = choice.finish_reason;
  if (text || choice.reads?.length) {
    if (!told.first) {
      told.first = performance.now();
      progress(null);
    }
    told.tokens += 1;
    write(turn, text || "", choice.reads);
  }
}

/// Adds text to an answer; the page is touched once a frame, however fast tokens come.
function write(turn, text, reads) {
  turn.content += text;
  (turn.pending ??= []).push([text, reads]);
  turn.frame ??= requestAnimationFrame(() => flush(turn));
}

function flush(turn) {
  cancelAnimationFrame(turn.frame);
  turn.frame = undefined;
  const box = turn.element.querySelector(".text");
  for (const [text, reads] of turn.pending ?? []) {
    if (turn.words) words.add(turn, box, text, reads ?? []);
    else if (box.lastChild) box.lastChild.appendData(text);
    else box.append(document.createTextNode(text));
  }
  turn.pending = [];
  toEnd(false);
  save();
}

// ---- hands

$("form").onsubmit = (event) => {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const text = $("input").value;
  if (!text.trim() || $("model").disabled) return;
  $("input").value = "";
  add("user", text);
  save();
  answer();
};
$("input").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("form").requestSubmit();
  }
};
$("input").oninput = save;
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !$("settings").open) running.abort();
});
$("clear").onclick = () => {
  running?.abort();
  turns = [];
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  $("empty").hidden = false;
  words.close();
  notice("");
  save();
  $("input").focus();
};
$("open-settings").onclick = () => $("settings").showModal();
$("settings").onclose = () => {
  save();
  if ($("model").disabled) connect();
};
$("model").onchange = () => { chosen(); save(); };
$("reads").onclick = () => {
  const on = $("reads").getAttribute("aria-pressed") !== "true";
  $("reads").setAttribute("aria-pressed", String(on));
  if (!on) words.close();
  else status("From the next answer on, point at a word to see what was read for it.");
  save();
};

connect(restore());
