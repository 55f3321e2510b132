// Grafana's grid, and rows that repeat for each value of a variable.
import { type Variables, spellOut } from './variables';

/** Where a panel of a dashboard file is; `render.tsx` has the rest of it. */
export interface Placed {
  type: string;
  title?: string;
  gridPos: { x: number; y: number; w: number; h: number };
  repeat?: string;
}

/** A panel with the variables that hold for it. */
export interface Scoped<P extends Placed> {
  model: P;
  variables: Variables;
}

const COLUMNS = 24;
const ROW_HEIGHT = 30;
const GAP = 8;

/** Where a panel is, in pixels. */
export function place({ gridPos: { x, y, w, h } }: Placed, width: number) {
  const column = (width - GAP * (COLUMNS - 1)) / COLUMNS;
  return {
    left: Math.round(x * (column + GAP)),
    top: y * (ROW_HEIGHT + GAP),
    width: Math.round(w * (column + GAP) - GAP),
    height: h * (ROW_HEIGHT + GAP) - GAP,
  };
}

/** A row with its panels, or the panels above the first row. */
function splitRows<P extends Placed>(panels: P[]): P[][] {
  const rows: P[][] = [];
  for (const panel of panels) {
    if (panel.type === 'row' || rows.length === 0) {
      rows.push([]);
    }
    rows[rows.length - 1].push(panel);
  }
  return rows;
}

/** One set of variables for each copy. */
function scopesOf({ repeat }: Placed, variables: Variables): Variables[] {
  const variable = repeat ? variables.get(repeat) : undefined;
  if (!variable) {
    return [variables];
  }
  return spellOut(variable).map((value) =>
    new Map(variables).set(variable.model.name, { ...variable, chosen: [value] })
  );
}

/** Repeats the rows that are to be repeated, and moves what is below them down. */
export function layOut<P extends Placed>(panels: P[], variables: Variables): Scoped<P>[] {
  const placed: Scoped<P>[] = [];
  let down = 0;
  for (const row of splitRows(panels)) {
    const repeated = row.find(({ type, repeat }) => type !== 'row' && repeat);
    if (repeated) {
      throw new Error(`panel "${repeated.title}": only rows can repeat here`);
    }
    const bottom = Math.max(...row.map(({ gridPos }) => gridPos.y + gridPos.h));
    const height = bottom - row[0].gridPos.y;
    const scopes = scopesOf(row[0], variables);
    scopes.forEach((scope, copy) => {
      for (const model of row) {
        const y = model.gridPos.y + down + copy * height;
        placed.push({ model: { ...model, gridPos: { ...model.gridPos, y } }, variables: scope });
      }
    });
    down += (scopes.length - 1) * height;
  }
  return placed;
}
