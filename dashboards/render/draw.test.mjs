// Draws small dashboards with data from a Prometheus that is made up here.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';

const DRAW = fileURLToPath(new URL('draw.mjs', import.meta.url));

let server, folder;
const asked = [];

function answer(path, parameters) {
  asked.push(parameters.get('query') ?? path);
  if (path.startsWith('/api/v1/label/')) {
    return { status: 'success', data: ['digits', 'flights'] };
  }
  if (parameters.get('query').includes('broken')) {
    return { status: 'error', error: 'parse error' };
  }
  const result = parameters.get('query').includes('empty')
    ? []
    : [{ metric: { model: 'digits' }, value: [Number(parameters.get('time')), '1.5'] }];
  return { status: 'success', data: { resultType: 'vector', result } };
}

before(async () => {
  folder = await mkdtemp(join(tmpdir(), 'draw-'));
  server = createServer((request, response) => {
    const { pathname, searchParams } = new URL(request.url, 'http://127.0.0.1');
    response.end(JSON.stringify(answer(pathname, searchParams)));
  });
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
});

after(async () => {
  server.close();
  await rm(folder, { recursive: true });
});

async function draw(exprs, ...options) {
  const dashboard = join(folder, 'small.json');
  const out = join(folder, 'small.png');
  const panels = exprs.map((expr, index) => ({
    type: 'stat',
    title: `Panel ${index}`,
    gridPos: { x: index * 6, y: 0, w: 6, h: 4 },
    targets: [{ refId: 'A', expr, instant: true }],
  }));
  const list = [{ name: 'model', type: 'query', query: 'label_values(some, model)', multi: true }];
  await writeFile(dashboard, JSON.stringify({ title: 'Small', panels, templating: { list } }));
  const prometheus = `http://127.0.0.1:${server.address().port}`;
  const given = ['--prometheus', prometheus, '--dashboard', dashboard, '--out', out, ...options];
  return new Promise((done) => {
    execFile(process.execPath, [DRAW, ...given], async (error, stdout, stderr) => {
      done({ code: error?.code ?? 0, stdout, stderr, png: await readFile(out).catch(() => null) });
    });
  });
}

test('draws a dashboard of the given width, and says what has no data', async () => {
  const { code, stdout, png } = await draw(['some', 'empty'], '--width', '1200');
  assert.equal(code, 0);
  assert.match(stdout, /small\.json: no data in panel "Panel 1"/);
  assert.equal(png.subarray(1, 4).toString(), 'PNG');
  assert.equal(png.readUInt32BE(16), 1200);
});

test('asks with variables and the rate interval filled in', async () => {
  const query = 'rate(some{model=~"$model"}[$__rate_interval])';
  const values = ['--var', 'model=digits', '--var', 'model=a.b'];
  const times = ['--from', '-15m', '--scrape-interval', '15s'];
  assert.equal((await draw([query], ...values, ...times)).code, 0);
  assert.equal(asked.at(-1), 'rate(some{model=~"(digits|a\\\\.b)"}[60s])');
});

test('a query that fails is named, and the rest is drawn', async () => {
  const { code, stderr, png } = await draw(['some', 'broken{']);
  assert.equal(code, 1);
  assert.match(stderr, /small\.json: panel "Panel 1": parse error; expression: broken\{/);
  assert.ok(png.length > 1000);
});

test('a variable that the dashboard does not have is refused', async () => {
  const { code, stderr } = await draw(['some'], '--var', 'modle=digits');
  assert.equal(code, 1);
  assert.match(stderr, /no variable modle; there are: model/);
});
