"use strict";
// Reads what the server says of itself every two seconds; text from the server is only ever set as text.

const by = (id) => document.getElementById(id);
const EVERY_MS = 2000;
let before = null, control = null, model = "";
const progress = new Map(); // of each batch: when it was first seen, and what was done then

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(options.headers || {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) by("key-card").hidden = false;
  if (!answer.ok) {
    let message = `status ${answer.status}`;
    try { message = (await answer.json()).error.message; } catch { /* no JSON */ }
    throw new Error(message);
  }
  return answer;
}

function make(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(2)} GiB`;
const per = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });

function clock(seconds) {
  const s = Math.max(0, Math.round(seconds)), pad = (n) => String(n).padStart(2, "0");
  return `${Math.floor(s / 3600)}:${pad(Math.floor(s / 60) % 60)}:${pad(s % 60)}`;
}

function show(status) {
  model = status.model;
  by("model").textContent = model;
  by("state").textContent = status.state;
  by("key-card").hidden = true;
  by("plan").textContent = status.plan.join("\n");
  const passed = before ? status.time - before.time : 0;
  const rate = (name) => (passed > 0 ? (status[name] - before[name]) / passed : 0);
  const rows = [
    ["Running", per(status.running)], ["Waiting", per(status.waiting)],
    ["Tokens/s", per(rate("tokens"))],
    ["Planned tokens/s, full batch", status.planned_tokens_per_second === null ? "unknown" : per(status.planned_tokens_per_second)],
    ["Weights transferred", `${(rate("streamed_bytes") / 1e9).toFixed(1)} GB/s`],
    ["Passes", per(status.passes)], ["KV cache in use", `${Math.round(status.kv_cache_usage * 100)} %`],
  ];
  by("figures").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
  by("memory").replaceChildren(...status.memory.flatMap((one) => {
    const words = `${one.place}: ${gib(one.used)} in use, ${gib(one.planned)} planned`;
    return [make("div", words), make("progress", words, { max: Math.max(one.planned, one.used, 1), value: one.used, "aria-label": words })];
  }));
  const most = status.max_new_tokens, tokens = by("tokens");
  if (most && Number(tokens.max) !== most) {
    tokens.max = most;
    tokens.value = Math.min(tokens.value, most);
  }
  by("upload").hidden = !status.keeps_batches;
  by("no-state").hidden = status.keeps_batches;
  before = status;
}

function timeLeft(batch) {
  const counts = batch.request_counts, done = counts.completed + counts.failed, now = Date.now() / 1000;
  if (batch.status !== "in_progress") return "";
  if (!progress.has(batch.id)) progress.set(batch.id, { at: now, done });
  const from = progress.get(batch.id);
  return done > from.done ? clock((counts.total - done) * (now - from.at) / (done - from.done)) : "unknown";
}

function download(batch, id, name) {
  const button = make("button", name, { type: "button", "aria-label": `download ${name} of ${batch.id}` });
  button.addEventListener("click", () => told(async () => {
    const link = make("a", "", { download: `${batch.id}_${name}.jsonl` });
    link.href = URL.createObjectURL(await (await ask(`v1/files/${id}/content`)).blob());
    link.click();
    URL.revokeObjectURL(link.href);
  }));
  return button;
}

function row(batch) {
  const counts = batch.request_counts, done = counts.completed + counts.failed;
  const made = make("tr", undefined, { role: "row" }); // roles of their own, since a narrow page shows no table
  made.dataset.id = batch.id;
  const cell = (text) => make("td", text, { role: "cell" }), bar = cell(), files = cell(), action = cell();
  bar.append(make("progress", "", { max: Math.max(1, counts.total), value: done, "aria-label": `${done} of ${counts.total} requests` }),
    ` ${done} of ${counts.total}${counts.failed ? `, ${counts.failed} failed` : ""}`);
  if (batch.output_file_id) files.append(download(batch, batch.output_file_id, "output"), " ");
  if (batch.error_file_id) files.append(download(batch, batch.error_file_id, "errors"));
  if (["validating", "in_progress"].includes(batch.status)) {
    const cancel = make("button", "Cancel", { type: "button", "aria-label": `cancel ${batch.id}` });
    cancel.addEventListener("click", () => told(async () => { await ask(`v1/batches/${batch.id}/cancel`, { method: "POST" }); await batches(); }));
    action.append(cancel);
  }
  const why = batch.errors ? `${batch.status}: ${batch.errors.data[0].message}` : batch.status;
  made.append(make("th", batch.id, { role: "rowheader" }), cell(why), bar, cell(timeLeft(batch)), files, action);
  return made;
}

async function batches() {
  const found = await (await ask("v1/batches?limit=50")).json();
  const label = document.activeElement?.getAttribute("aria-label");
  by("batches").replaceChildren(...found.data.map(row));
  if (label) by("batches").querySelector(`[aria-label="${CSS.escape(label)}"]`)?.focus();
}

async function told(work) {
  by("said").textContent = "";
  by("said").className = "";
  try { await work(); } catch (error) { by("said").textContent = error.message; by("said").className = "bad"; }
}

async function refresh() {
  try {
    show(await (await ask("status")).json());
    if (before.keeps_batches) await batches();
  } catch (error) { by("state").textContent = error.message; }
  setTimeout(refresh, EVERY_MS);
}

async function* events(body) {
  let text = "";
  for await (const chunk of body.pipeThrough(new TextDecoderStream())) {
    text += chunk;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

by("try").addEventListener("submit", async (event) => {
  event.preventDefault();
  const isChat = by("kind").value === "chat", prompt = by("prompt").value, answer = by("answer");
  const asked = isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  control = new AbortController();
  answer.textContent = "";
  answer.className = "";
  answer.setAttribute("aria-busy", "true"); // it is read out once it is there, not word by word
  by("send").disabled = !(by("stop").disabled = false);
  try {
    const found = await ask(isChat ? "v1/chat/completions" : "v1/completions", {
      method: "POST", headers: { "Content-Type": "application/json" }, signal: control.signal,
      body: JSON.stringify({ model, stream: true, max_tokens: Number(by("tokens").value), ...asked }),
    });
    for await (const one of events(found.body)) {
      if (one.error) throw new Error(one.error.message);
      for (const choice of one.choices) answer.textContent += choice.text ?? choice.delta.content ?? "";
    }
  } catch (error) {
    if (error.name !== "AbortError") { answer.textContent += `\n${error.message}`; answer.className = "bad"; }
  }
  answer.setAttribute("aria-busy", "false");
  const wasHere = document.activeElement === by("stop") || document.activeElement === document.body;
  by("stop").disabled = !(by("send").disabled = false);
  if (wasHere) by("send").focus(); // a button that is switched off loses the focus
});
by("stop").addEventListener("click", () => control?.abort());
by("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", by("key").value);
  by("key").value = "";
  by("key-card").hidden = true;
});
by("upload").addEventListener("submit", (event) => {
  event.preventDefault();
  told(async () => {
    const form = new FormData();
    form.append("purpose", "batch");
    form.append("file", by("file").files[0]);
    const file = await (await ask("v1/files", { method: "POST", body: form })).json();
    const body = JSON.stringify({ input_file_id: file.id, endpoint: by("endpoint").value, completion_window: "24h" });
    const batch = await (await ask("v1/batches", { method: "POST", headers: { "Content-Type": "application/json" }, body })).json();
    by("said").textContent = `${batch.id} has begun`;
    by("file").value = "";
    await batches();
  });
});
refresh();
