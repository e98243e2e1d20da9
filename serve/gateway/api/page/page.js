// The playground: asks the gateway as any client would, and shows what the answer says about itself.
"use strict";

const at = (id) => document.getElementById(id);
const TINT_AT = Math.log(100); // a token of probability 1/100 or less has the full tint
const DISAGREE_AT = 1; // nats: so does one at which mixing gains that much over the members' mean
let running = null;
let written = []; // of each shown token: its span and its ids
let promptIds = [];

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function showOffer() {
  const answer = await fetch("v1/models", { headers: headers() });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error.message);
  const [whole, ...tiers] = body.data;
  at("offer").textContent = `${whole.id}: ${tiers.length} tiers, prior version ${whole.population.prior_version}`;
  const select = at("tier");
  const chosen = select.value;
  select.replaceChildren(new Option(`default (${whole.population.tier})`, ""));
  for (const card of tiers) {
    const loss = card.population.test_loss ? `, ${card.population.test_loss.nats.toFixed(3)} nats` : "";
    const members = card.population.budget === 1 ? "1 member" : `${card.population.budget} members`;
    select.add(new Option(`${card.population.tier} (${members}${loss})`, card.population.tier));
  }
  select.value = chosen;
}

function request() {
  const body = {
    prompt: at("prompt").value,
    max_tokens: Number(at("max_tokens").value),
    temperature: Number(at("temperature").value),
    logprobs: 0,
    stream: true,
    stream_interval: 1,
    return_token_ids: true,
    stream_options: { include_usage: true },
  };
  if (at("tier").value) body.budget = at("tier").value;
  if (at("budget").value) {
    body.latency_budget_ms = Number(at("budget").value);
    body.on_deadline = at("on_deadline").value;
  }
  return body;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    let end;
    while ((end = rest.indexOf("\n\n")) >= 0) {
      const line = rest.slice(0, end);
      rest = rest.slice(end + 2);
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

function tint(span, logprob) {
  if (typeof logprob !== "number") return;
  span.style.backgroundColor = `rgba(var(--tint), ${(0.7 * Math.min(1, -logprob / TINT_AT)).toFixed(3)})`;
  span.title = `probability ${Math.exp(logprob).toPrecision(3)}`;
}

function showTokens(choice) {
  const known = choice.logprobs;
  const texts = known && known.tokens && known.tokens.join("") === choice.text ? known.tokens : [choice.text];
  const ids = choice.token_ids || [];
  texts.forEach((text, idx) => {
    const span = document.createElement("span");
    span.className = "token";
    span.textContent = text;
    if (known && known.token_logprobs) tint(span, known.token_logprobs[idx]);
    at("answer").append(span);
    written.push({ span, ids: texts.length === ids.length ? [ids[idx]] : idx ? [] : ids });
  });
  return known && known.tokens ? known.tokens.length : 1;
}

function showPopulation(found) {
  at("served").textContent = found.tier_asked && found.tier_asked !== found.tier ? `${found.tier} (asked: ${found.tier_asked})` : found.tier;
  if (found.deadline) at("deadline").textContent = `${found.deadline}${found.truncated ? ", truncated" : ""} (${found.elapsed_ms} ms)`;
  const left = new Set((found.drops || []).map((drop) => drop.member));
  at("members").replaceChildren(...found.members.map((member, idx) => {
    const row = document.createElement("div");
    row.className = left.has(member) ? "member left" : "member";
    const name = document.createElement("span"), bar = document.createElement("i"), weight = document.createElement("span");
    name.textContent = member;
    bar.style.width = `${100 * found.weights[idx]}%`;
    weight.textContent = found.weights[idx].toFixed(3);
    row.append(name, bar, weight);
    return row;
  }));
}

// What each member alone makes of the answer: tokens are then tinted by how much they disagree.
async function showDisagreement(tier) {
  const ids = written.flatMap((token) => token.ids);
  if (!promptIds.length || !ids.length) return;
  const answer = await fetch("v1/population/disagreement", {
    method: "POST", headers: headers(), body: JSON.stringify({ prompt: [...promptIds, ...ids], budget: tier }),
  });
  if (!answer.ok) return; // the tint by probability stays
  const found = await answer.json();
  let position = promptIds.length;
  for (const { span, ids: own } of written) {
    const gaps = found.disagreement_nats.slice(position, position + own.length);
    if (gaps.length) {
      const gap = Math.max(...gaps);
      span.style.backgroundColor = `rgba(var(--tint), ${(0.7 * Math.min(1, gap / DISAGREE_AT)).toFixed(3)})`;
      const each = found.members.map((member, idx) => `${member} ${Math.exp(found.logprobs[idx][position]).toPrecision(2)}`);
      span.title += `; members: ${each.join(", ")}; disagreement ${gap.toFixed(3)} nats`;
    }
    position += own.length;
  }
  at("legend").textContent = "Tint: how much the members disagreed about the token (full at 1 nat)";
}

async function complete() {
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  at("state").className = "";
  at("state").textContent = "waiting";
  for (const id of ["served", "speed", "first", "deadline"]) at(id).textContent = "–";
  const prompt = document.createElement("span");
  prompt.className = "prompt";
  prompt.textContent = at("prompt").value;
  at("answer").replaceChildren(prompt);
  written = [];
  promptIds = [];
  at("legend").textContent = "Tint: how unlikely the mixture found the token (full at one in a hundred)";
  const beganAt = performance.now();
  let firstAt = 0, tokens = 0, finish = null, population = null;
  const answer = await fetch("v1/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(request()), signal: running.signal,
  });
  if (!answer.ok) {
    const body = await answer.json();
    throw new Error(`${answer.status} ${body.error.code}: ${body.error.message}`);
  }
  for await (const event of events(answer)) {
    if (event.error) throw new Error(`${event.error.code}: ${event.error.message}`);
    if (event.population) showPopulation(population = event.population);
    for (const choice of event.choices || []) {
      if (choice.prompt_token_ids) promptIds = choice.prompt_token_ids;
      if (choice.text) tokens += showTokens(choice);
      finish = choice.finish_reason || finish;
    }
    if (!firstAt && tokens) {
      firstAt = performance.now();
      at("first").textContent = `${(firstAt - beganAt).toFixed(0)} ms`;
      at("state").textContent = "streaming";
    }
    const passed = (performance.now() - firstAt) / 1000;
    if (tokens > 1 && passed > 0) at("speed").textContent = ((tokens - 1) / passed).toFixed(1);
  }
  if (population && population.members.length > 1) await showDisagreement(population.tier);
  at("state").textContent = `done: ${tokens} tokens, ${finish || "no end"}`;
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await complete();
  } catch (error) {
    at("state").textContent = error.name === "AbortError" ? "stopped" : error.message;
    at("state").className = error.name === "AbortError" ? "" : "error";
  } finally {
    at("send").disabled = false;
    at("stop").disabled = true;
  }
});
at("stop").addEventListener("click", () => running && running.abort());
const refresh = () => showOffer().catch((error) => { at("offer").textContent = error.message; });
at("key").addEventListener("change", refresh);
refresh();
