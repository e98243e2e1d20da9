"use strict";
// The API from openapi.json: each route with the fields it takes and the answers it gives.

function add(parent, tag, text = "", className = "") {
  const made = parent.appendChild(document.createElement(tag));
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function typeOf(schema, schemas) {
  if (schema.$ref) return typeOf(schemas[schema.$ref.split("/").pop()] ?? {}, schemas);
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" | ");
  if (schema.anyOf) return schema.anyOf.map((each) => typeOf(each, schemas)).join(" | ");
  if (schema.type === "array") return `array of ${typeOf(schema.items ?? {}, schemas)}`;
  return [schema.type ?? "any"].flat().join(" | ");
}

function table(parent, head, rows) {
  const made = add(parent, "table");
  const top = add(made, "tr");
  for (const name of head) add(top, "th", name);
  for (const row of rows) {
    const line = add(made, "tr");
    row.forEach((cell, idx) => add(add(line, "td"), idx ? "span" : "code", cell));
  }
}

function route(parent, path, method, operation, schemas) {
  const made = add(parent, "details");
  const summary = add(made, "summary");
  add(summary, "b", method.toUpperCase());
  add(summary, "code", path);
  add(summary, "span", operation.description ?? operation.summary ?? "");
  if (operation.security) add(made, "p", "Needs an API key, as Authorization: Bearer KEY.");
  for (const each of operation.parameters ?? []) add(made, "p", `${each.name}: ${typeOf(each.schema, schemas)}, in the ${each.in}`);
  const body = operation.requestBody?.content["application/json"].schema;
  if (body) {
    const fields = Object.entries(body.properties ?? {}).map(([name, field]) => [
      name,
      typeOf(field, schemas) + (body.required?.includes(name) ? ", required" : ""),
      field.description ?? "",
    ]);
    table(made, ["field", "type", ""], fields);
  }
  const answers = Object.entries(operation.responses ?? {}).map(([status, answer]) => [
    status, Object.keys(answer.content ?? {}).join(", "), answer.description ?? "",
  ]);
  table(made, ["status", "answer", ""], answers);
}

async function show() {
  const found = await (await fetch("openapi.json")).json();
  const main = document.getElementById("routes");
  main.replaceChildren();
  document.getElementById("title").textContent = found.info.title;
  document.getElementById("about").textContent = `${found.info.description} Version ${found.info.version}.`;
  const groups = new Map();
  for (const [path, methods] of Object.entries(found.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const tag = operation.tags?.[0] ?? "others";
      if (!groups.has(tag)) {
        groups.set(tag, add(main, "section"));
        add(groups.get(tag), "h2", tag);
      }
      route(groups.get(tag), path, method, operation, found.components.schemas);
    }
  }
}

show().catch((error) => {
  const shown = add(document.getElementById("routes"), "p", `The description could not be read: ${error}`);
  shown.className = "error";
});
