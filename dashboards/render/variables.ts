// Template variables: their values from Prometheus, and their place in queries and titles.
import { type Prometheus } from './prometheus';

export const ALL = '$__all';

/** A variable as a dashboard file has it. */
export interface VariableModel {
  name: string;
  type: string;
  label?: string;
  hide?: number;
  query?: string | { query?: string };
  regex?: string;
  sort?: number;
  multi?: boolean;
  includeAll?: boolean;
  allValue?: string | null;
  current?: { value?: string | string[]; text?: string | string[] };
}

/** A variable with its chosen value. */
export interface Variable {
  model: VariableModel;
  /** What it can be, without "All". */
  options: string[];
  /** What is chosen: one value, several, or `[ALL]`. */
  chosen: string[];
}

export type Variables = Map<string, Variable>;

// What Grafana takes as a variable: $name, [[name:format]], ${name.field:format}.
const REFERENCE = /\$(\w+)|\[\[(\w+?)(?::(\w+))?\]\]|\$\{(\w+)(?:\.[^:}]+)?(?::([^}]+))?\}/g;

const asList = (value: string | string[] | undefined): string[] =>
  value === undefined || value === '' ? [] : Array.isArray(value) ? value : [value];

/** The values that a variable stands for, with "All" spelt out. */
export const spellOut = ({ chosen, options }: Variable) =>
  chosen.includes(ALL) ? options : chosen;

// Prometheus reads a backslash in a string literal too, so those of a regex are doubled.
const escapeRegex = (value: string) =>
  value.replace(/\\/g, '\\\\\\\\').replace(/[$^*{}[\]'+?.()|]/g, '\\\\$&');
const escapeString = (value: string) => value.replace(/\\/g, '\\\\').replace(/"/g, '\\"');

function formatForQuery(variable: Variable): string {
  const { model, chosen } = variable;
  if (chosen.includes(ALL) && model.allValue) {
    return model.allValue;
  }
  const values = spellOut(variable);
  if (!model.multi && !model.includeAll) {
    return escapeString(values[0] ?? '');
  }
  const escaped = values.map(escapeRegex);
  return escaped.length === 1 ? escaped[0] : `(${escaped.join('|')})`;
}

const FORMATS: Record<string, (variable: Variable) => string> = {
  csv: (variable) => spellOut(variable).join(','),
  pipe: (variable) => spellOut(variable).join('|'),
  queryparam: ({ model, chosen }) =>
    chosen.map((value) => `var-${model.name}=${encodeURIComponent(value)}`).join('&'),
  raw: (variable) => spellOut(variable).join(','),
  regex: formatForQuery,
  text: ({ chosen }) => (chosen.includes(ALL) ? 'All' : chosen.join(' + ')),
};

/** Replaces references in a text; unknown ones stay, as in Grafana. */
export function interpolate(
  text: string,
  variables: Variables,
  defaultFormat: 'regex' | 'text',
  builtIn: Record<string, string> = {}
): string {
  return text.replace(REFERENCE, (whole, plain, square, squareFormat, curly, curlyFormat) => {
    const name: string = plain ?? square ?? curly;
    if (name in builtIn) {
      return builtIn[name];
    }
    const variable = variables.get(name);
    if (!variable) {
      return whole;
    }
    const format = squareFormat ?? curlyFormat ?? defaultFormat;
    if (!(format in FORMATS)) {
      throw new Error(`${whole}: the format ${format} is not known here`);
    }
    return FORMATS[format](variable);
  });
}

const SORTS: Array<((a: string, b: string) => number) | undefined> = [
  undefined,
  (a, b) => (a < b ? -1 : 1),
  (a, b) => (a < b ? 1 : -1),
  (a, b) => parseFloat(a) - parseFloat(b),
  (a, b) => parseFloat(b) - parseFloat(a),
  (a, b) => a.toLowerCase().localeCompare(b.toLowerCase()),
  (a, b) => b.toLowerCase().localeCompare(a.toLowerCase()),
  (a, b) => a.localeCompare(b, undefined, { numeric: true }),
  (a, b) => b.localeCompare(a, undefined, { numeric: true }),
];

function filterByRegex(values: string[], regex: string | undefined): string[] {
  if (!regex) {
    return values;
  }
  const parts = /^\/(.*)\/([gimsuy]*)$/.exec(regex);
  const pattern = parts
    ? new RegExp(parts[1], parts[2].replace('g', ''))
    : new RegExp(`^${regex}$`);
  return values.flatMap((value) => {
    const match = pattern.exec(value);
    return match ? [match[1] ?? match[0]] : [];
  });
}

async function findOptions(
  model: VariableModel,
  known: Variables,
  prometheus: Prometheus
): Promise<string[]> {
  const written = (typeof model.query === 'string' ? model.query : model.query?.query) ?? '';
  switch (model.type) {
    case 'query': {
      const found = await prometheus.findVariableValues(interpolate(written, known, 'regex'));
      const values = [...new Set(filterByRegex(found, model.regex))];
      return SORTS[model.sort ?? 0] ? values.sort(SORTS[model.sort ?? 0]) : values;
    }
    case 'custom':
    case 'interval':
      return written
        .split(',')
        .map((value) => value.trim())
        .filter(Boolean);
    case 'constant':
    case 'textbox':
      return [written];
    case 'datasource':
      return ['prometheus'];
    default:
      throw new Error(`variables of type ${model.type} are not known here`);
  }
}

function choose(model: VariableModel, options: string[], given: string[] | undefined): string[] {
  if (given) {
    return given.map((value) => (value === 'All' ? ALL : value));
  }
  const current = asList(model.current?.value);
  if (current.length > 0 && current.every((value) => value === ALL || options.includes(value))) {
    return current;
  }
  // Grafana takes the first of the list, and "All" is its first.
  return model.includeAll ? [ALL] : options.slice(0, 1);
}

/** Every variable of a dashboard, in order: later ones may use earlier ones. */
export async function resolveVariables(
  models: VariableModel[],
  given: Record<string, string[]>,
  prometheus: Prometheus
): Promise<Variables> {
  const known: Variables = new Map();
  for (const model of models) {
    try {
      const options = await findOptions(model, known, prometheus);
      known.set(model.name, { model, options, chosen: choose(model, options, given[model.name]) });
    } catch (error) {
      throw new Error(`variable ${model.name}: ${(error as Error).message}`);
    }
  }
  const unknown = Object.keys(given).filter((name) => !known.has(name));
  if (unknown.length > 0) {
    throw new Error(
      `no variable ${unknown.join(', ')}; there are: ${[...known.keys()].join(', ')}`
    );
  }
  return known;
}
