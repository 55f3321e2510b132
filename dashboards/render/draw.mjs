#!/usr/bin/env node
// Draws a dashboard file into a PNG: Grafana's components in a headless browser, data from a live
// Prometheus. README.md beside this file says what is Grafana's and what is not.
import { readFile, stat, writeFile } from 'node:fs/promises';
import { basename } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import { chromium } from 'playwright-core';
import UPNG from 'upng-js';

const HELP = `draw.mjs --prometheus URL --dashboard FILE --out FILE.png [options]

  --prometheus URL          a Prometheus server that has the data
  --dashboard FILE          the dashboard, Grafana's JSON
  --out FILE.png            where the picture goes
  --from -15m               how far back (default: what the dashboard says)
  --var NAME=VALUE          a variable's value; again for more values; All for all
  --width 1400              of the page, in pixels
  --scrape-interval 10s     of Prometheus, for $__rate_interval
  --chromium /usr/bin/chromium

Exits 1 when a query fails; the picture is written all the same.`;

const ORIGIN = 'http://dashboards.localhost';
const HERE = fileURLToPath(new URL('.', import.meta.url));
const MODULES = `${HERE}node_modules/`;
const FONTS = [
  [/\/inter\/Inter-Medium/, '@fontsource/inter/files/inter-latin-500-normal.woff2'],
  [/\/inter\//, '@fontsource/inter/files/inter-latin-400-normal.woff2'],
  [/\/roboto\//, '@fontsource/roboto-mono/files/roboto-mono-latin-400-normal.woff2'],
];
const PAGE = `<!doctype html><meta charset="utf-8">
<link rel="stylesheet" href="/page.css">
<style>html, body { margin: 0; background: #111217; overflow: visible !important; }</style>
<div id="root"></div>
<script>window.__grafana_public_path__ = '/public/';</script>
<script type="module" src="/page.js"></script>`;

class UsageError extends Error {}

function readOptions() {
  // parseArgs takes a value that begins with a dash only after an equals sign.
  const args = process.argv.slice(2);
  const from = args.indexOf('--from');
  if (from >= 0) {
    args.splice(from, 2, `--from=${args[from + 1]}`);
  }
  const { values } = parseArgs({
    args,
    options: {
      prometheus: { type: 'string' },
      dashboard: { type: 'string' },
      out: { type: 'string' },
      from: { type: 'string' },
      var: { type: 'string', multiple: true, default: [] },
      width: { type: 'string', default: '1400' },
      'scrape-interval': { type: 'string', default: '10s' },
      chromium: { type: 'string', default: '/usr/bin/chromium' },
      help: { type: 'boolean' },
    },
  });
  if (values.help) {
    console.log(HELP);
    process.exit(0);
  }
  for (const name of ['prometheus', 'dashboard', 'out']) {
    if (!values[name]) {
      throw new UsageError(`--${name} is missing`);
    }
  }
  const width = Number(values.width);
  if (!(width >= 400 && width <= 4000)) {
    throw new UsageError(`--width is 400 to 4000, not ${values.width}`);
  }
  const variables = {};
  for (const pair of values.var) {
    const [, name, value] = /^(\w+)=(.+)$/.exec(pair) ?? [];
    if (!name) {
      throw new UsageError(`--var is NAME=VALUE, not ${pair}`);
    }
    (variables[name] ??= []).push(value);
  }
  return { ...values, width, variables };
}

async function ask(url) {
  try {
    const response = await fetch(url);
    return { status: response.status, body: await response.text() };
  } catch (error) {
    const reason = error.cause?.message || error.cause?.code || error.message;
    return {
      status: 502,
      body: JSON.stringify({ error: `no answer from ${url.split('?')[0]}: ${reason}` }),
    };
  }
}

/** Answers everything that the page asks for, so that nothing leaves this machine. */
function serve(prometheus) {
  return async (route) => {
    const { pathname, search, origin } = new URL(route.request().url());
    const file = (path) => route.fulfill({ path });
    if (origin !== ORIGIN) {
      await route.abort();
    } else if (pathname === '/') {
      await route.fulfill({ contentType: 'text/html', body: PAGE });
    } else if (/^\/page\.(js|css)$/.test(pathname)) {
      await file(`${HERE}build${pathname}`);
    } else if (pathname.startsWith('/public/img/icons/')) {
      await file(`${MODULES}@grafana/ui/dist${pathname}`);
    } else if (pathname.startsWith('/public/fonts/')) {
      await file(MODULES + FONTS.find(([pattern]) => pattern.test(pathname))[1]);
    } else if (pathname.startsWith('/prometheus/')) {
      await route.fulfill(await ask(prometheus.replace(/\/$/, '') + pathname.slice(11) + search));
    } else {
      await route.fulfill({ status: 404, body: '' });
    }
  };
}

/** The picture in 256 colours: hardly to be told from all of them, and a third of the size. */
function shrink(png) {
  const image = UPNG.decode(png.buffer.slice(png.byteOffset, png.byteOffset + png.length));
  const [pixels] = UPNG.toRGBA8(image);
  return Buffer.from(UPNG.encode([pixels], image.width, image.height, 256));
}

async function draw(options) {
  const dashboard = JSON.parse(await readFile(options.dashboard, 'utf8'));
  const browser = await chromium.launch({
    executablePath: options.chromium,
    // Chromium's sandbox does not start as root, as which containers run.
    chromiumSandbox: process.getuid() !== 0,
    args: ['--disable-gpu', '--disable-quic', '--disable-background-networking', '--disable-sync'],
  });
  try {
    const page = await browser.newPage({
      viewport: { width: options.width, height: 900 },
      timezoneId: 'UTC',
      colorScheme: 'dark',
      reducedMotion: 'reduce',
    });
    const faults = [];
    page.on('pageerror', (error) => faults.push(error.message));
    await page.route('**/*', serve(options.prometheus));
    await page.goto(ORIGIN);
    await page.waitForFunction(() => window.draw);
    const job = {
      dashboard,
      from: options.from,
      variables: options.variables,
      width: options.width,
      scrapeInterval: options['scrape-interval'],
    };
    const { errors, empty } = await page.evaluate((given) => window.draw(given), job);
    // Icons and fonts come after the first drawing, and charts are drawn in the next frame.
    await page.waitForLoadState('networkidle');
    await page.evaluate(async () => {
      await document.fonts.ready;
      await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    });
    const picture = await page.screenshot({ fullPage: true, animations: 'disabled' });
    await writeFile(options.out, shrink(picture));
    return { errors: [...errors, ...faults], empty };
  } finally {
    await browser.close();
  }
}

let name = 'draw.mjs';
try {
  const options = readOptions();
  name = basename(options.dashboard);
  await stat(`${HERE}build/page.js`).catch(() => {
    throw new UsageError('build/page.js is missing; run: npm ci && npm run build');
  });
  const { errors, empty } = await draw(options);
  for (const error of errors) {
    console.error(`error: ${name}: ${error}`);
  }
  for (const title of empty) {
    console.log(`${name}: no data in panel "${title}"`);
  }
  console.log(`${name}: drawn to ${options.out}`);
  process.exitCode = errors.length > 0 ? 1 : 0;
} catch (error) {
  const [message] = error.message.replace(/^page\.evaluate: Error: /, '').split('\n');
  console.error(`error: ${name}: ${message}`);
  const isUsage = error instanceof UsageError || error.code?.startsWith('ERR_PARSE_ARGS');
  process.exitCode = isUsage ? 2 : 1;
}
