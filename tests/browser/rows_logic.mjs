/** What the rows' modules without a page do; run by `node --test`. */

import assert from "node:assert/strict";
import { test } from "node:test";

const web = process.env.QWENLORA_WEB;
const value = await import(`${web}/rows/value.js`);
const { inTodaysLayout } = await import(`${web}/rows/restore.js`);
const { Names, parts } = await import(`${web}/rows/names.js`);
const { faultsOf } = await import(`${web}/rows/faults.js`);
const { RowList } = await import(`${web}/rows/list.js`);

const row = (lora_name, strength = 1, enabled = true) => ({ lora_name, strength, enabled });
const AB = [row("a"), row("b", 0.5, false)];

test("a value is read in every shape, and nothing else is taken for rows", () => {
  assert.deepEqual(value.asRows({ __value__: AB }), AB);
  assert.deepEqual(value.asRows([{ lora: "a", on: false, lora_strength: "0,5" }]), [
    row("a", 0.5, false),
  ]);
  assert.deepEqual(value.asRows([{ lora_name: "None", strength: NaN }]), [row("")]);
  for (const other of [null, undefined, 3, "a", {}, [1], [null], ["a", 0]]) {
    assert.equal(value.asRows(other), null);
  }
});

test("strengths are read as they are typed, and kept within the limits", () => {
  const read = { "0,8": 0.8, " -1.25 ": -1.25, 1e3: 100, "-1000": -100, "": null, x: null };
  for (const [text, number] of Object.entries(read)) assert.equal(value.asStrength(text), number);
  assert.equal(value.asStrength(Infinity), null);
  assert.equal(value.strengthText(1), "1.00");
  assert.equal(value.strengthText(-0.125), "-0.125");
  assert.equal(value.strengthText(0.29), "0.29");
  assert.equal(value.stepped(0.1, 0.2), 0.3);
  assert.equal(value.stepped(99.99, 0.05), 100);
});

test("lists are changed into new ones, within their limits", () => {
  assert.deepEqual(value.changed(AB, 1, { enabled: true }), [AB[0], row("b", 0.5)]);
  assert.equal(value.added(AB, 2), AB);
  assert.deepEqual(value.added(AB, 3), [...AB, row("")]);
  assert.deepEqual(value.removed(AB, 0, 1), [AB[1]]);
  assert.deepEqual(value.removed([AB[0]], 0, 1), [row("")]);
  const letters = [row("a"), row("b"), row("c")];
  const order = (from, to) => value.moved(letters, from, to).map((own) => own.lora_name).join("");
  assert.deepEqual([order(0, 2), order(2, 0), order(1, 1), order(0, -1), order(2, 3)], [
    "bca",
    "cab",
    "abc",
    "abc",
    "abc",
  ]);
  assert.deepEqual(value.toggledAll(AB).map((own) => own.enabled), [true, true]);
  assert.deepEqual(value.toggledAll([AB[0]]).map((own) => own.enabled), [false]);
  assert.equal(AB[1].enabled, false);
});

test("widgets behind the rows keep their values in every layout", () => {
  const rest = ["style", "", "0:1", "steps"];
  const cells = ["a", 1, true, "b", 0.5, false];
  for (const first of [[2, ...cells], [...cells, "None", 1, true]]) {
    const today = inTodaysLayout({ widgets_values: [...first, ...rest] });
    assert.deepEqual(today.widgets_values, [AB, ...rest]);
  }
  const kept = { widgets_values: [AB, ...rest], inputs: [{ name: "model", link: 3 }] };
  assert.equal(inTodaysLayout(kept), kept);
  const unknown = { widgets_values: ["a", "b"], inputs: [] };
  assert.equal(inTodaysLayout(unknown), unknown);
  assert.equal(inTodaysLayout({}).widgets_values, undefined);
});

test("names say more than positions, and lose the cells of rows", () => {
  const named = { "loras.1.lora_name": "b", "loras.1.strength": 0.5, "loras.1.enabled": false };
  const saved = {
    widgets_values: [1, "x", 1, true],
    widgets_values_named: { ...named, "loras.0.lora_name": "a", blocks: "style" },
  };
  const today = inTodaysLayout(saved);
  assert.deepEqual(today.widgets_values[0], AB);
  assert.deepEqual(today.widgets_values_named, { blocks: "style", loras: AB });
  assert.deepEqual(inTodaysLayout({ widgets_values: [], widgets_values_named: { loras: AB } })
    .widgets_values, [AB]);
});

test("inputs of the cells go, but for those with a link", () => {
  const inputs = [
    { name: "model", link: null },
    { name: "lora_name_1", link: null },
    { name: "loras.0.strength", link: null },
    { name: "loras", link: null },
    { name: "strength_1", link: 4 },
  ];
  const today = inTodaysLayout({ widgets_values: ["a", 1, true], inputs });
  assert.deepEqual(today.inputs.map((input) => input.name), ["model", "strength_1"]);
});

test("the finder puts the best first", () => {
  const names = new Names([
    "other/starry_light.safetensors",
    "light/x.safetensors",
    "qwen\\Light.safetensors",
    "qwen/enlighten.safetensors",
    "qwen/light_8_steps.safetensors",
  ]);
  assert.deepEqual(names.find("light"), [
    "qwen\\Light.safetensors",
    "qwen/light_8_steps.safetensors",
    "other/starry_light.safetensors",
    "qwen/enlighten.safetensors",
    "light/x.safetensors",
  ]);
  assert.deepEqual(names.find("8 QWEN"), ["qwen/light_8_steps.safetensors"]);
  assert.deepEqual(names.find("qwen\\li"), names.find("qwen/li"));
  assert.deepEqual(names.find("nothing"), []);
  assert.equal(names.find("  ").length, 5);
  assert.ok(names.has("qwen/Light.safetensors"));
  assert.ok(!names.has("qwen/light.safetensors"));
  assert.deepEqual(parts("a\\b/c.safetensors"), { folder: "a/b/", base: "c" });
  assert.deepEqual(parts("c.pt"), { folder: "", base: "c.pt" });
});

test("three thousand names are found within a blink", () => {
  const list = Array.from({ length: 3000 }, (_, i) => `folder ${i % 50}/some name ${i}.safetensors`);
  const names = new Names(list);
  const begun = performance.now();
  for (const query of ["s", "so", "some 299", "folder 7 name"]) names.find(query);
  assert.ok(performance.now() - begun < 1000);
});

test("an error's rows are found by their numbers", () => {
  const text = "loras.0.lora_name: LoRA 'x' is missing\nhint: y\nloras.12.lora_name: LoRA 'z'";
  assert.deepEqual([...faultsOf(text)], [
    [0, "LoRA 'x' is missing"],
    [12, "LoRA 'z'"],
  ]);
  assert.equal(faultsOf(undefined).size, 0);
});

test("a list tells of changes, and of those alone", () => {
  const list = new RowList({ names: ["a"] });
  let told = 0;
  list.addEventListener("change", () => (told += 1));
  list.read("nothing");
  list.read(AB);
  list.blame(new Map([[0, "wrong"]]));
  assert.equal(told, 2);
  list.replace(value.toggledAll(list.rows));
  assert.equal(list.faults.size, 0);
  list.read([]);
  assert.deepEqual(list.rows, [row("")]);
  list.offer(["a", "b"]);
  assert.ok(list.names.has("b"));
});
