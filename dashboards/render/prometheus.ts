// Prometheus: its HTTP API, and Grafana's data frames from its answers.
import {
  type DataFrame,
  type Field,
  FieldType,
  type Labels,
  type TimeRange,
  createDataFrame,
} from '@grafana/data';

import { type Variables, interpolate } from './variables';

/** A query of a panel, as a dashboard file has it. */
export interface Target {
  refId: string;
  expr?: string;
  legendFormat?: string;
  format?: 'time_series' | 'table' | 'heatmap';
  interval?: string;
  instant?: boolean;
  range?: boolean;
  hide?: boolean;
}

/** A query with everything filled in. */
export interface Query {
  target: Target;
  expr: string;
  legendFormat: string;
  range: TimeRange;
  stepMs: number;
}

interface Series {
  metric: Labels;
  value?: [number, string];
  values?: Array<[number, string]>;
}

type Answer =
  | { resultType: 'matrix' | 'vector'; result: Series[] }
  | { resultType: 'scalar'; result: [number, string] };

const parseValue = (text: string) =>
  text === '+Inf' ? Infinity : text === '-Inf' ? -Infinity : parseFloat(text);

/** The HTTP API of a Prometheus server. */
export class Prometheus {
  constructor(
    private readonly base: string,
    private readonly range: TimeRange
  ) {}

  private async ask<T>(path: string, parameters: Record<string, string>): Promise<T> {
    const response = await fetch(`${this.base}/api/v1/${path}?${new URLSearchParams(parameters)}`);
    const body = await response.json().catch(() => ({ error: `HTTP ${response.status}` }));
    if (body.status !== 'success') {
      throw new Error(body.error ?? `HTTP ${response.status}`);
    }
    return body.data;
  }

  /** One query's data frames, one for each series. */
  async run(query: Query): Promise<DataFrame[]> {
    const { instant, range } = query.target;
    const frames: DataFrame[] = [];
    const to = query.range.to.valueOf();
    if (instant) {
      const answer = await this.ask<Answer>('query', { query: query.expr, time: `${to / 1000}` });
      frames.push(...toFrames(query, answer));
    }
    // Grafana runs a query that says neither over the range.
    if (range || !instant) {
      const align = (time: number) => Math.floor(time / query.stepMs) * query.stepMs;
      const answer = await this.ask<Answer>('query_range', {
        query: query.expr,
        start: `${align(query.range.from.valueOf()) / 1000}`,
        end: `${align(to) / 1000}`,
        step: `${query.stepMs / 1000}`,
      });
      frames.push(...toFrames(query, answer));
    }
    return frames;
  }

  /** Values for a variable: `label_values`, `metrics` or `query_result`. */
  async findVariableValues(query: string): Promise<string[]> {
    const between = {
      start: `${this.range.from.valueOf() / 1000}`,
      end: `${this.range.to.valueOf() / 1000}`,
    };
    const labels = /^label_values\((?:(.+),\s*)?(\w+)\s*\)\s*$/s.exec(query);
    if (labels) {
      const [, selector, label] = labels;
      return this.ask(`label/${label}/values`, {
        ...between,
        ...(selector ? { 'match[]': selector.trim() } : {}),
      });
    }
    const metrics = /^metrics\((.+)\)\s*$/s.exec(query);
    if (metrics) {
      const names = await this.ask<string[]>('label/__name__/values', between);
      return names.filter((name) => new RegExp(metrics[1]).test(name));
    }
    const result = /^query_result\((.+)\)\s*$/s.exec(query);
    if (result) {
      const answer = await this.ask<Answer>('query', { query: result[1], time: between.end });
      if (answer.resultType === 'scalar') {
        return [answer.result[1]];
      }
      return answer.result.map(({ metric, value }) => {
        const [time, number] = value ?? [0, ''];
        return `${nameOf(metric)} ${number} ${time * 1000}`;
      });
    }
    throw new Error(`not a query for values: ${query}`);
  }
}

function nameOf({ __name__ = '', ...labels }: Labels): string {
  const pairs = Object.keys(labels)
    .sort()
    .map((key) => `${key}="${labels[key]}"`);
  return pairs.length > 0 || !__name__ ? `${__name__}{${pairs.join(', ')}}` : __name__;
}

function legendOf({ expr, legendFormat }: Query, labels: Labels): string {
  if (legendFormat === '__auto') {
    return Object.keys(labels).length > 0 ? '' : expr;
  }
  const legend = legendFormat
    ? legendFormat.replace(/\{\{\s*(.+?)\s*\}\}/g, (_, label) => labels[label] ?? '')
    : nameOf(labels);
  return legend === '{}' ? expr : legend;
}

function toFrames(query: Query, answer: Answer): DataFrame[] {
  const series: Series[] =
    answer.resultType === 'scalar' ? [{ metric: {}, value: answer.result }] : answer.result;
  return series.map(({ metric, value, values }) => {
    const samples = values ?? (value ? [value] : []);
    const legend = legendOf(query, metric);
    return createDataFrame({
      name: legend,
      refId: query.target.refId,
      meta: { custom: { resultType: answer.resultType } },
      fields: [
        {
          name: 'Time',
          type: FieldType.time,
          config: { interval: query.stepMs },
          values: samples.map(([time]) => time * 1000),
        },
        {
          name: 'Value',
          type: FieldType.number,
          labels: metric,
          config: legend ? { displayNameFromDS: legend } : {},
          values: samples.map(([, number]) => parseValue(number)),
        },
      ],
    });
  });
}

/** One table of a query's series: time, labels, value. */
function toTable(frames: DataFrame[], refId: string, valueName: string): DataFrame {
  const labels = [...new Set(frames.flatMap((frame) => Object.keys(frame.fields[1].labels ?? {})))];
  const column = (name: string, type: FieldType, values: unknown[]): Field => ({
    name,
    type,
    config: type === FieldType.string ? { filterable: true } : {},
    values,
  });
  const every = (pick: (frame: DataFrame) => unknown[]) => frames.flatMap(pick);
  return createDataFrame({
    refId,
    fields: [
      column(
        'Time',
        FieldType.time,
        every((frame) => [...frame.fields[0].values])
      ),
      ...labels.sort().map((label) =>
        column(
          label,
          FieldType.string,
          every((frame) => frame.fields[1].values.map(() => frame.fields[1].labels?.[label] ?? ''))
        )
      ),
      column(
        valueName,
        FieldType.number,
        every((frame) => [...frame.fields[1].values])
      ),
    ],
  });
}

/** Cumulative buckets to counts of their own, in the order of `le`. */
function toBuckets(frames: DataFrame[]): DataFrame[] {
  const bound = (frame: DataFrame) => parseValue(frame.fields[1].labels?.le ?? 'NaN');
  const sorted = [...frames].sort((a, b) => bound(a) - bound(b));
  return sorted.map((frame, index) => {
    const [time, value] = frame.fields;
    const below = index > 0 ? sorted[index - 1] : undefined;
    const before = new Map(
      below?.fields[0].values.map((at, row) => [at, below.fields[1].values[row]])
    );
    const name = value.labels?.le ?? 'Value';
    return {
      ...frame,
      name,
      fields: [
        time,
        {
          ...value,
          name,
          config: { ...value.config, displayNameFromDS: name },
          values: value.values.map((count, row) =>
            Math.max(0, count - (before.get(time.values[row]) ?? 0))
          ),
        },
      ],
    };
  });
}

/** A query of a panel that failed. */
export class QueryError extends Error {
  constructor(
    readonly expr: string,
    message: string
  ) {
    super(message);
  }
}

/** Runs a panel's queries. */
export async function runTargets(
  targets: Target[],
  options: { range: TimeRange; stepMs: (target: Target) => number; scrapeMs: number },
  variables: Variables,
  prometheus: Prometheus
): Promise<DataFrame[]> {
  const shown = targets.filter(({ hide, expr }) => !hide && expr);
  const ids = shown.map(({ refId }) => refId);
  if (new Set(ids).size < ids.length) {
    // Grafana keeps answers by refId, so it would show one of them only.
    throw new QueryError(
      shown[0].expr!,
      `refId is not unique among the queries: "${ids.join('", "')}"`
    );
  }
  const tables = shown.filter(({ format }) => format === 'table').length;
  const answers = shown.map(async (target) => {
    const stepMs = options.stepMs(target);
    const rangeMs = options.range.to.valueOf() - options.range.from.valueOf();
    const seconds = (ms: number) => `${Math.round(ms / 1000)}s`;
    const builtIn = {
      __interval: seconds(stepMs),
      __interval_ms: `${stepMs}`,
      __rate_interval: seconds(Math.max(stepMs + options.scrapeMs, 4 * options.scrapeMs)),
      __range: seconds(rangeMs),
      __range_s: `${Math.round(rangeMs / 1000)}`,
      __range_ms: `${rangeMs}`,
    };
    const expr = interpolate(target.expr!, variables, 'regex', builtIn);
    const legendFormat = interpolate(target.legendFormat ?? '', variables, 'text', builtIn);
    try {
      const query = { target, expr, legendFormat, range: options.range, stepMs };
      const frames = await prometheus.run(query);
      if (target.format === 'table') {
        const valueName = tables > 1 ? `Value #${target.refId}` : 'Value';
        return frames.length > 0 ? [toTable(frames, target.refId, valueName)] : [];
      }
      return target.format === 'heatmap' ? toBuckets(frames) : frames;
    } catch (error) {
      throw new QueryError(expr, (error as Error).message);
    }
  });
  return (await Promise.all(answers)).flat();
}
