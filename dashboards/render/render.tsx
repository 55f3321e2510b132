// The page: a whole dashboard. draw.mjs opens it in a browser and takes its picture.
import './gauge';

import {
  type DataFrame,
  type DataTransformerConfig,
  type FieldConfigSource,
  type GrafanaConfig,
  type TimeRange,
  createTheme,
  dateMath,
  dateTime,
  locationUtil,
  rangeUtil,
} from '@grafana/data';
import {
  Alert,
  GlobalStyles,
  Icon,
  PanelChrome,
  Text,
  ThemeContext,
  ToolbarButton,
} from '@grafana/ui';
import { Component, type ReactNode } from 'react';
import { type Root, createRoot } from 'react-dom/client';

import { PANEL_TYPES, fieldConfigOf, optionsOf, prepareFrames } from './fields';
import { type Placed, type Scoped, layOut, place } from './layout';
import { PanelContent, STAND_INS } from './panels';
import { Prometheus, QueryError, type Target, runTargets } from './prometheus';
import { type VariableModel, type Variables, interpolate, resolveVariables } from './variables';

interface PanelModel extends Placed {
  description?: string;
  transparent?: boolean;
  links?: unknown[];
  targets?: Target[];
  transformations?: DataTransformerConfig[];
  fieldConfig?: unknown;
  options?: unknown;
  interval?: string;
  timeFrom?: string;
  maxDataPoints?: number;
  collapsed?: boolean;
  panels?: PanelModel[];
}

interface DashboardModel {
  title: string;
  panels: PanelModel[];
  templating?: { list: VariableModel[] };
  time?: { from: string; to: string };
}

/** What draw.mjs asks for. */
interface Job {
  dashboard: DashboardModel;
  from?: string;
  variables: Record<string, string[]>;
  width: number;
  scrapeInterval: string;
}

/** What it gets: panels that failed, and why, and panels that have no data. */
interface Result {
  errors: string[];
  empty: string[];
}

interface DrawnPanel extends Scoped<PanelModel> {
  title: string;
  frames: DataFrame[];
  source: FieldConfigSource;
  range: TimeRange;
  replace: (text: string) => string;
  error?: string;
}

const PADDING = 16;

const theme = createTheme({ colors: { mode: 'dark' } });

locationUtil.initialize({
  config: { appSubUrl: '' } as GrafanaConfig,
  getTimeRangeForUrl: () => ({ from: 'now-1h', to: 'now' }),
  getVariablesUrlParams: () => ({}),
});

function toRange(from: string, to: string): TimeRange {
  const parse = (text: string) => {
    const time = dateMath.toDateTime(text, {});
    if (!time?.isValid()) {
      throw new Error(`not a time: ${text}; for example: -15m`);
    }
    return dateTime(time);
  };
  return { from: parse(from), to: parse(to), raw: { from, to } };
}

async function preparePanel(
  { model, variables }: Scoped<PanelModel>,
  job: Job,
  range: TimeRange,
  prometheus: Prometheus
): Promise<DrawnPanel> {
  const replace = (text: string) => interpolate(text, variables, 'text');
  const panel: DrawnPanel = {
    model,
    variables,
    title: replace(model.title ?? ''),
    frames: [],
    source: fieldConfigOf(model.type, model.fieldConfig),
    range: model.timeFrom ? toRange(`now-${model.timeFrom}`, 'now') : range,
    replace,
  };
  try {
    if (!PANEL_TYPES.includes(model.type)) {
      throw new Error(`panels of type ${model.type} are not known here: ${PANEL_TYPES.join(', ')}`);
    }
    const points = model.maxDataPoints ?? place(model, job.width).width;
    const stepMs = (target: Target) => {
      const least = target.interval || model.interval || job.scrapeInterval;
      return rangeUtil.calculateInterval(panel.range, points, least).intervalMs;
    };
    const scrapeMs = rangeUtil.intervalToMs(job.scrapeInterval);
    const limits = { range: panel.range, stepMs, scrapeMs };
    const frames = await runTargets(model.targets ?? [], limits, variables, prometheus);
    const transformations = model.transformations ?? [];
    panel.frames = await prepareFrames(frames, transformations, panel.source, theme, replace);
  } catch (error) {
    panel.error = describeError(error);
  }
  return panel;
}

function describeError(error: unknown): string {
  const where = error instanceof QueryError ? `; expression: ${error.expr}` : '';
  return `${(error as Error).message}${where}`;
}

function Fault({ text }: { text: string }) {
  return (
    <div style={{ height: '100%', overflow: 'hidden', overflowWrap: 'anywhere' }}>
      <Alert severity="error" title="Error">
        {text}
      </Alert>
    </div>
  );
}

/** Keeps a panel that cannot be drawn from taking the others with it. */
class Boundary extends Component<{ panel: DrawnPanel; children: ReactNode }, { error?: string }> {
  state: { error?: string } = {};

  static getDerivedStateFromError(error: Error) {
    return { error: error.message };
  }

  componentDidCatch(error: Error) {
    this.props.panel.error = error.message;
  }

  render() {
    const { error } = this.state;
    return error ? <Fault text={error} /> : this.props.children;
  }
}

function Panel({ panel, width: pageWidth }: { panel: DrawnPanel; width: number }) {
  const { model, title, error } = panel;
  const { left, top, width, height } = place(model, pageWidth);
  const items = [
    model.links?.length && <ToolbarButton key="links" icon="external-link-alt" iconSize="md" />,
    STAND_INS.has(model.type) && (
      <Text key="note" variant="bodySmall" color="disabled">
        stand-in for Grafana's {model.type} panel
      </Text>
    ),
  ].filter(Boolean);
  return (
    <div style={{ position: 'absolute', left, top }}>
      <PanelChrome
        title={title}
        titleItems={
          items.length > 0 && <div style={{ display: 'flex', alignItems: 'center' }}>{items}</div>
        }
        description={model.description}
        width={width}
        height={height}
        statusMessage={error}
        displayMode={model.transparent ? 'transparent' : 'default'}
      >
        {(innerWidth, innerHeight) =>
          error ? (
            <Fault text={error} />
          ) : (
            <Boundary panel={panel}>
              <PanelContent
                {...panel}
                type={model.type}
                options={optionsOf(model.type, model.options)}
                width={innerWidth}
                height={innerHeight}
              />
            </Boundary>
          )
        }
      </PanelChrome>
    </div>
  );
}

function Row({ row: { model, variables }, width }: { row: Scoped<PanelModel>; width: number }) {
  const { left, top, height } = place(model, width);
  const hidden = model.collapsed ? (model.panels?.length ?? 0) : 0;
  const style = { left, top, height, display: 'flex', alignItems: 'center', gap: 8 } as const;
  return (
    <div style={{ ...style, position: 'absolute' }}>
      <Icon name={model.collapsed ? 'angle-right' : 'angle-down'} />
      <Text variant="h5">{interpolate(model.title ?? '', variables, 'text')}</Text>
      {hidden > 0 && <Text color="secondary">({hidden} panels)</Text>}
    </div>
  );
}

function Header({ job, range, variables }: { job: Job; range: TimeRange; variables: Variables }) {
  const shown = [...variables.values()].filter(
    ({ model }) => model.hide !== 2 && model.type !== 'constant'
  );
  const box = { border: `1px solid ${theme.colors.border.medium}`, padding: '5px 10px' };
  return (
    <header style={{ display: 'flex', gap: 16, alignItems: 'center', marginBottom: 16 }}>
      <div style={{ flexGrow: 1 }}>
        <Text variant="h4" element="h1">
          {job.dashboard.title}
        </Text>
      </div>
      {shown.map(({ model }) => (
        <div key={model.name} style={{ display: 'flex' }}>
          <span style={{ ...box, background: theme.colors.background.secondary }}>
            {model.label || model.name}
          </span>
          <span style={{ ...box, background: theme.components.input.background }}>
            {interpolate(`\${${model.name}}`, variables, 'text')}
          </span>
        </div>
      ))}
      <ToolbarButton variant="canvas" icon="clock-nine">
        {rangeUtil.describeTimeRange(range.raw)}
      </ToolbarButton>
    </header>
  );
}

async function render(root: Root, content: ReactNode) {
  root.render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      {content}
    </ThemeContext.Provider>
  );
  // React draws when it finds the time; two frames later it has.
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
}

async function draw(job: Job): Promise<Result> {
  const root = createRoot(document.getElementById('root')!);
  // Axes and values are laid out by the width of their text, so the fonts must be there first.
  await render(root, null);
  const fonts = ['400 12px Inter', '500 12px Inter', '400 12px "Roboto Mono"'];
  await Promise.all(fonts.map((font) => document.fonts.load(font)));

  const { dashboard } = job;
  const range = job.from
    ? toRange(`now${job.from.replace(/^now/, '')}`, 'now')
    : toRange(dashboard.time?.from ?? 'now-6h', dashboard.time?.to ?? 'now');
  const prometheus = new Prometheus('/prometheus', range);
  const models = dashboard.templating?.list ?? [];
  const variables = await resolveVariables(models, job.variables, prometheus);
  const placed = layOut(dashboard.panels, variables);
  const width = job.width - 2 * PADDING;
  const rows = placed.filter(({ model }) => model.type === 'row');
  const panels: DrawnPanel[] = [];
  // One after the other: a small Prometheus refuses many queries at a time.
  for (const panel of placed.filter(({ model }) => model.type !== 'row')) {
    panels.push(await preparePanel(panel, { ...job, width }, range, prometheus));
  }

  const places = placed.map(({ model }) => place(model, width));
  const height = Math.max(0, ...places.map((at) => at.top + at.height));
  await render(
    root,
    <div style={{ width: job.width, padding: PADDING }}>
      <Header job={job} range={range} variables={variables} />
      <main style={{ position: 'relative', height }}>
        {rows.map((row, index) => (
          <Row key={index} row={row} width={width} />
        ))}
        {panels.map((panel, index) => (
          <Panel key={index} panel={panel} width={width} />
        ))}
      </main>
    </div>
  );
  const isEmpty = ({ model, frames, error }: DrawnPanel) =>
    !error && model.type !== 'text' && !frames.some(({ length }) => length > 0);
  return {
    errors: panels.flatMap(({ title, error }) => (error ? [`panel "${title}": ${error}`] : [])),
    empty: panels.filter(isEmpty).map(({ title }) => title),
  };
}

Object.assign(window, { draw });
