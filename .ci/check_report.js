// SPDX-FileCopyrightText: 2026 the run_utils authors
// SPDX-License-Identifier: MIT
// Look at pages of `report` in a real browser. Standard input is what check_report.py
// says about them; a line of output is "ok NAME" or "FAIL NAME: WHY".
"use strict";

const fs = require("node:fs");
const { chromium } = require("playwright-core");
const { HtmlValidate } = require("html-validate");
const AXE = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
];
const job = JSON.parse(fs.readFileSync(0, "utf8"));
let browser;

async function main() {
  browser = await chromium.launch({ executablePath: job.browser, args: FLAGS });
  for (const page of job.pages) {
    await check(`valid-${page.name}`, () => validates(page));
  }
  for (const page of job.pages) {
    for (const scheme of ["light", "dark"]) {
      for (const width of [1400, 800]) {
        const name = `looks-${page.name}-${scheme}-${width}`;
        await check(name, () => looks(page, scheme, width));
      }
    }
  }
  await check("sorts", () => onPage("nine", sorts));
  await check("filters", () => onPage("nine", filters));
  await check("selects", () => onPage("nine", selects));
  await check("hover", () => onPage("nine", hovers));
  await check("hover-of-a-band", () => onPage("seeds", hovers));
  await check("logarithm", () => onPage("seeds", logarithm));
  await check("images", () => onPage("nine", images));
  await check("without-scripts", withoutScripts);
  await check("prints", prints);
  await check("hostile", () => onPage("hostile", hostile));
  await check("quick", quick);
  if (job.picture) await check("picture", picture);
  await browser.close();
}

async function check(name, run) {
  try {
    await run();
    console.log(`ok ${name}`);
  } catch (error) {
    const lines = String(error.message).split("\n").slice(0, 12);
    console.log(`FAIL ${name}: ${lines.join(" | ")}`);
  }
}

function expect(found, wanted, what) {
  const [a, b] = [JSON.stringify(found), JSON.stringify(wanted)];
  if (a !== b) throw new Error(`${what}: ${a}, not ${b}`);
}

function pathOf(name) {
  return job.pages.find((page) => page.name === name).path;
}

// Open a page, fail for any message of the console and any request but its own file.
async function open(path, options = {}) {
  const context = await browser.newContext({
    viewport: { width: 1400, height: 900 }, ...options,
  });
  const page = await context.newPage();
  page.wrong = [];
  page.on("console", (message) => page.wrong.push(`console: ${message.text()}`));
  page.on("pageerror", (error) => page.wrong.push(`error: ${error.message}`));
  page.on("dialog", (dialog) => page.wrong.push(`dialog: ${dialog.message()}`));
  page.on("request", (request) => {
    const url = request.url();
    const isOwn = url.split("#")[0] === `file://${path}` || url.startsWith("data:");
    if (!isOwn) page.wrong.push(`request: ${url.slice(0, 200)}`);
  });
  await page.goto(`file://${path}`);
  return page;
}

async function close(page) {
  await page.context().close();
  expect(page.wrong, [], "the page");
}

async function onPage(name, run) {
  const page = await open(pathOf(name));
  await run(page);
  await close(page);
}

async function validates({ path }) {
  const rules = {
    extends: ["html-validate:recommended"],
    rules: { "long-title": "off", "require-sri": "off" },
  };
  const source = fs.readFileSync(path, "utf8");
  const report = await new HtmlValidate(rules).validateString(source);
  const found = report.results.flatMap((result) => result.messages);
  const told = found.slice(0, 5).map((m) => `${m.ruleId} ${m.message} at ${m.line}`);
  expect(told, [], "html-validate");
}

async function looks({ path }, scheme, width) {
  const viewport = { width, height: 900 };
  const page = await open(path, { viewport, colorScheme: scheme });
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  expect(wide <= width, true, `${wide} pixels wide`);
  await page.evaluate(AXE);
  const found = await page.evaluate(async () => {
    const result = await window.axe.run(document, { resultTypes: ["violations"] });
    return result.violations.map((v) => `${v.id} ${v.nodes[0].html.slice(0, 150)}`);
  });
  expect(found, [], "axe");
  await close(page);
}

async function column(page, heading) {
  const heads = await page.locator(".runs thead th").allTextContents();
  const number = heads.indexOf(heading) + 1;
  if (number === 0) throw new Error(`no column ${heading} in ${heads}`);
  return page.locator(`.runs tbody tr > *:nth-child(${number})`).allTextContents();
}

async function sorts(page) {
  const loss = page.locator(".runs th", { hasText: "loss" }).first();
  await loss.locator("button").click();
  expect(await loss.getAttribute("aria-sort"), "ascending", "aria-sort");
  const rising = (await column(page, "loss")).map(Number);
  expect(rising, [...rising].sort((a, b) => a - b), "sorted by mouse");
  await loss.locator("button").focus();
  await page.keyboard.press("Enter");
  expect(await loss.getAttribute("aria-sort"), "descending", "aria-sort");
  expect((await column(page, "loss")).map(Number), rising.reverse(), "by keyboard");
  await page.locator(".runs th", { hasText: "time" }).locator("button").click();
  expect(await page.locator("[aria-sort]").count(), 1, "columns with aria-sort");
  const times = await page.locator(".runs td[data-value]").evaluateAll((cells) => {
    const first = cells[0].cellIndex;
    return cells.filter((c) => c.cellIndex === first).map((c) => +c.dataset.value);
  });
  expect(times, [...times].sort((a, b) => a - b), "sorted by what cells mean");
}

async function filters(page) {
  const all = await page.locator(".runs tbody tr").count();
  await page.locator("#filter").fill("vit-small sgd");
  const shown = await page.locator(".runs tbody tr:visible").allTextContents();
  expect(shown.length > 0 && shown.length < all, true, "some rows are left");
  expect(shown.every((row) => /vit-small/.test(row) && /sgd/.test(row)), true, "rows");
  const lines = await page.locator(".plot >> nth=0 >> .area g:visible").count();
  expect(lines, shown.length, "curves");
  const count = await page.locator("#count").textContent();
  expect(count, `${shown.length} of ${all} runs`, "count");
  await page.locator("#filter").fill("");
  expect(await page.locator(".runs tbody tr:visible").count(), all, "all rows again");
}

async function selects(page) {
  const row = page.locator(".runs tbody tr").nth(2);
  const line = await row.getAttribute("data-line");
  await row.locator("input").focus();
  await page.keyboard.press("Space");
  for (const plot of await page.locator(".plot").all()) {
    const clear = await plot.locator(".area g:not(.faded)").evaluateAll((groups) =>
      groups.map((group) => group.dataset.line));
    expect(clear, [line], "the curve that is not faded");
  }
  await page.locator("#clear").click();
  expect(await page.locator(".faded").count(), 0, "faded after clearing");
}

// Put the pointer on a point that was drawn; the tip must have its step and value.
async function hovers(page) {
  const svg = page.locator(".plot svg").first();
  await svg.scrollIntoViewIfNeeded();
  const box = await svg.boundingBox();
  const point = await page.evaluate(() => {
    const plot = curves[0]; // of the page's script
    const curve = decode(plot.curves[0]);
    const at = curve[1].length - 3;
    const [step, value, spread] = [curve[1][at], curve[2][at], curve[3][at]];
    const x = 56 + (572 * (step - plot.x[0])) / (plot.x[1] - plot.x[0]);
    const y = 270 - (262 * (value - plot.y[0])) / (plot.y[1] - plot.y[0]);
    return { x, y, step, value, spread };
  });
  await page.mouse.move(
    box.x + (point.x * box.width) / 640, box.y + (point.y * box.height) / 300,
  );
  const text = await page.locator("#tip").textContent();
  expect(text.includes(`step ${point.step}`), true, `${text}, step ${point.step}`);
  const seven = (number) => Number(number.toPrecision(7));
  let value = `val/acc ${point.value}`;
  if (point.spread !== undefined) {
    value = `val/acc ${seven(point.value)} \u00b1 ${seven(point.spread)}`;
  }
  expect(text.includes(value), true, `${text}, ${value}`);
  expect(await page.locator(".plot >> nth=1 >> .area .lit").count(), 1, "other plots");
  await page.mouse.move(2, 2);
  expect(await page.locator("#tip").isVisible(), false, "the tip goes away");
}

async function logarithm(page) {
  const plot = page.locator(".plot").nth(1);
  const button = plot.locator("button");
  const paths = () => plot.locator(".area path").evaluateAll((all) =>
    all.map((path) => path.getAttribute("d")));
  const before = await paths();
  await button.click();
  expect(await button.getAttribute("aria-pressed"), "true", "aria-pressed");
  const after = await paths();
  expect(after.length, before.length, "paths");
  expect(after.some((path) => path.includes("NaN")), false, "no place for some point");
  expect(after.every((path, n) => path !== before[n]), true, "paths change");
  expect(await plot.locator(".y:visible").count(), 1, "axes");
  await button.click();
  expect(await button.getAttribute("aria-pressed"), "false", "aria-pressed");
}

async function images(page) {
  expect(await page.locator("img").count(), 0, "images before a strip is opened");
  await page.locator("summary", { hasText: "samples/" }).click();
  const image = page.locator("details[open] img").first();
  await image.scrollIntoViewIfNeeded();
  await image.evaluate((found) => found.decode());
  const isImage = (text) => /^request: file:.*samples.*png$/.test(text);
  page.wrong = page.wrong.filter((text) => !isImage(text));
}

async function withoutScripts() {
  const page = await open(pathOf("nine"), { javaScriptEnabled: false });
  expect(await page.locator(".runs tbody tr:visible").count(), 9, "rows");
  expect(await page.locator(".plot >> nth=0 >> .area path:visible").count(), 9, "curves");
  const dead = await page.locator("button:visible, input:visible").count();
  expect(dead, 0, "dead controls");
  await page.locator(".runs tbody a").nth(4).click();
  expect(await page.locator("#run-4").isVisible(), true, "a link opens the details");
  await close(page);
}

async function prints() {
  const width = 1047; // A4 across, within its margins
  for (const name of ["nine", "sixty", "hostile", "picture"]) {
    const page = await open(pathOf(name), { viewport: { width, height: 718 } });
    await page.emulateMedia({ media: "print" });
    const wide = await page.evaluate(() => document.documentElement.scrollWidth);
    expect(wide <= width, true, `${name} is ${wide} pixels wide`);
    const heads = page.locator(".runs thead th");
    const shown = await page.locator(".runs thead button:visible").count();
    expect(shown, await heads.count(), "headings");
    expect(await page.locator("figure button:visible").count(), 0, "dead controls");
    await close(page);
  }
}

async function hostile(page) {
  for (const summary of await page.locator("summary").all()) await summary.click();
  const hit = await page.evaluate(() => typeof window.hit);
  expect(hit, "undefined", "a script of a run");
  page.wrong = page.wrong.filter((text) => !/^request: file:/.test(text));
}

// Time on the processor, which does not depend on what else the machine does.
async function quick() {
  const page = await open("/dev/null");
  const session = await page.context().newCDPSession(page);
  await session.send("Performance.enable", { timeDomain: "threadTicks" });
  const busy = async () => {
    const { metrics } = await session.send("Performance.getMetrics");
    return metrics.find((metric) => metric.name === "TaskDuration").value;
  };
  await page.goto(`file://${pathOf("thousand")}`);
  const opened = await busy();
  await page.locator(".runs th button").nth(4).click();
  await page.locator("#filter").fill("resnet50");
  const [shown, all] = [opened.toFixed(2), (await busy()).toFixed(2)];
  console.log(`# 1,000 runs: open after ${shown} s, sorted and filtered after ${all} s`);
  expect(opened <= 2, true, `interactive after ${opened} s`);
  await page.context().close();
}

async function picture() {
  const page = await open(pathOf("picture"), {
    viewport: { width: 1400, height: 1420 }, deviceScaleFactor: 1,
  });
  await page.screenshot({ path: job.picture });
  await close(page);
}

main();
