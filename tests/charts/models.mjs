// Validates custom resources with their published models: as the API server would by their schemas, and, by TypeScript's types, that
// no field is unknown. Run by node in build/charts: a list of objects on stdin, a list of complaints on stdout.
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const PACKAGES = {
  "monitoring.coreos.com": "prometheus-operator",
  "keda.sh": "keda",
  "gateway.networking.k8s.io": "gateway-api",
};
const root = process.cwd();
const complaints = [];
const typed = [];

for (const object of JSON.parse(readFileSync(0, "utf8"))) {
  const [group, version] = object.apiVersion.split("/");
  const path = `@kubernetes-models/${PACKAGES[group]}/${group}/${version}/${object.kind}`;
  const model = (await import(pathToFileURL(join(root, "node_modules", path + ".js"))))[object.kind];
  try {
    new model(object).validate();
  } catch (error) {
    complaints.push(`${object.kind} ${object.metadata.name}: ${error.message}`);
  }
  typed.push(`import type { I${object.kind} as T${typed.length} } from "${path}";`);
  typed.push(`export const o${typed.length}: T${typed.length - 1} = ${JSON.stringify(object)};`);
}

const directory = mkdtempSync(join(root, "typed-"));
try {
  writeFileSync(join(directory, "objects.ts"), typed.join("\n"));
  const options = "--noEmit --strict --skipLibCheck --module nodenext --target es2022 --pretty false".split(" ");
  const tsc = spawnSync(join(root, "node_modules/.bin/tsc"), [...options, join(directory, "objects.ts")], { encoding: "utf8" });
  if (tsc.status !== 0) complaints.push(tsc.stdout + tsc.stderr);
} finally {
  rmSync(directory, { recursive: true });
}
console.log(JSON.stringify(complaints));
