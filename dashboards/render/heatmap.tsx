// A stand-in for Grafana's heatmap panel, which is in no package: the cells and the colour scale
// are drawn here, on the chart and axes of @grafana/ui.
import {
  type DataFrame,
  type TimeRange,
  formattedValueToString,
  getValueFormat,
} from '@grafana/data';
import { UPlotChart, useTheme2 } from '@grafana/ui';
import * as chromatic from 'd3-scale-chromatic';

import { buildChart } from './chart';

const SCALE_HEIGHT = 30;
const LABEL_HEIGHT = 20;

/** Counts of buckets, from below, each over time. */
interface Cells {
  times: number[];
  bounds: string[];
  counts: number[][];
  least: number;
  most: number;
}

function toCells(frames: DataFrame[], atLeast: number): Cells {
  const times: number[] = [...new Set(frames.flatMap((frame) => [...frame.fields[0].values]))];
  times.sort((a, b) => a - b);
  const counts = frames.map(({ fields: [time, value] }) => {
    const rows = new Map(time.values.map((at, row) => [at, row]));
    return times.map((at) => value.values[rows.get(at) ?? -1] ?? 0);
  });
  const shown = counts.flat().filter((count) => count > atLeast);
  return {
    times,
    bounds: frames.map(({ fields }) => fields[1].name),
    counts,
    least: shown.reduce((a, b) => Math.min(a, b), Infinity),
    most: shown.reduce((a, b) => Math.max(a, b), 0),
  };
}

// These go from dark to light as they are; Grafana turns the others round in its dark theme.
const FROM_DARK = /^(Turbo|Cividis|Viridis|Magma|Inferno|Plasma|Warm|Cool)$/;

function schemeOf({ scheme, reverse }: { scheme: string; reverse: boolean }) {
  const schemes = chromatic as unknown as Record<string, (share: number) => string>;
  const color = schemes[`interpolate${scheme}`] ?? chromatic.interpolateOranges;
  const turn = FROM_DARK.test(scheme) === reverse;
  return (share: number) => color(turn ? 1 - share : share);
}

interface Props {
  frames: DataFrame[];
  options: Record<string, any>;
  range: TimeRange;
  width: number;
  height: number;
}

/** Buckets over time, coloured by count. */
export function Heatmap({ frames, options, range, width, height }: Props) {
  const theme = useTheme2();
  const cells = toCells(frames, options.filterValues.le);
  const color = schemeOf(options.color);
  const share = (count: number) => (count - cells.least) / (cells.most - cells.least || 1);
  const ofBound = getValueFormat(options.yAxis.unit);
  const ofCount = getValueFormat(options.cellValues?.unit ?? 'short');
  const chartHeight = height - (options.legend.show ? SCALE_HEIGHT : 0);

  const every = Math.ceil(cells.bounds.length / (chartHeight / LABEL_HEIGHT));
  const labels = cells.bounds.flatMap((bound, index): Array<[number, string]> => {
    const seconds = parseFloat(bound);
    const label = isNaN(seconds)
      ? bound
      : formattedValueToString(ofBound(seconds, options.yAxis.decimals));
    return index % every === 0 ? [[index + 1, label]] : [];
  });
  const lanes = { count: cells.bounds.length, labels };
  const config = buildChart(range, theme, lanes, (chart, context) => {
    const stepMs = cells.times.length > 1 ? cells.times[1] - cells.times[0] : 0;
    cells.counts.forEach((row, bucket) => {
      const [bottom, top] = [bucket, bucket + 1].map((y) => chart.valToPos(y, 'y', true));
      row.forEach((count, index) => {
        if (count > options.filterValues.le) {
          const [left, right] = [cells.times[index] - stepMs, cells.times[index]].map((time) =>
            chart.valToPos(time, 'x', true)
          );
          context.fillStyle = color(share(count));
          context.fillRect(
            left,
            top,
            right - left - options.cellGap,
            bottom - top - options.cellGap
          );
        }
      });
    });
  });

  const shades = Array.from({ length: 16 }, (_, index) => color(index / 15)).join();
  const scale = {
    display: 'flex',
    gap: 8,
    alignItems: 'center',
    fontSize: 12,
    height: SCALE_HEIGHT,
  };
  return (
    <div>
      <UPlotChart config={config} data={[cells.times]} width={width} height={chartHeight} />
      {options.legend.show && (
        <div style={scale}>
          <span>{formattedValueToString(ofCount(cells.least))}</span>
          <div
            style={{ width: 200, height: 8, background: `linear-gradient(to right, ${shades})` }}
          />
          <span>{formattedValueToString(ofCount(cells.most))}</span>
        </div>
      )}
    </div>
  );
}
