// Bundles the page that draws a dashboard into build/.
import { rm } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';

import { build } from 'esbuild';

const here = fileURLToPath(new URL('.', import.meta.url));

// Parts of @grafana/ui that no panel needs: code editors and maps.
const UNUSED =
  /^(monaco-editor|@monaco-editor\/react|react-monaco-editor|ol(\/.*)?|ol-mapbox-style)$/;

const leaveOut = {
  name: 'leave-out',
  setup(plugins) {
    plugins.onResolve({ filter: UNUSED }, ({ path }) => ({ path, namespace: 'unused' }));
    plugins.onLoad({ filter: /.*/, namespace: 'unused' }, () => ({
      contents: 'module.exports = {};',
      loader: 'js',
    }));
  },
};

// A CommonJS package, whose default export a strict ESM import like @grafana/ui's does not find.
const scrollbars = {
  name: 'scrollbars',
  setup(plugins) {
    const filter = /^react-custom-scrollbars-2$/;
    plugins.onResolve({ filter, namespace: 'file' }, ({ path }) => ({
      path,
      namespace: 'scrollbars',
    }));
    plugins.onLoad({ filter, namespace: 'scrollbars' }, ({ path }) => ({
      contents: `export { Scrollbars as default } from '${path}';`,
      resolveDir: here,
    }));
  },
};

await rm(`${here}build`, { recursive: true, force: true });
await build({
  absWorkingDir: here,
  entryPoints: { page: 'render.tsx' },
  outdir: 'build',
  bundle: true,
  format: 'esm',
  target: 'chrome120',
  minify: true,
  jsx: 'automatic',
  define: { 'process.env.NODE_ENV': '"production"', global: 'window' },
  loader: { '.svg': 'dataurl', '.png': 'dataurl', '.gif': 'dataurl' },
  alias: { 'react-use/lib': 'react-use/esm' },
  plugins: [leaveOut, scrollbars],
  logLevel: 'warning',
  logOverride: { 'import-is-undefined': 'silent' },
});
