// A stand-in for Grafana's state timeline panel, which is in no package: the bars are drawn here,
// on the chart, axes and legend of @grafana/ui.
import {
  type DataFrame,
  type DisplayValue,
  type Field,
  type TimeRange,
  formattedValueToString,
  getFieldDisplayName,
} from '@grafana/data';
import { UPlotChart, VizLayout, VizLegend, useTheme2 } from '@grafana/ui';

import { buildChart } from './chart';

/** A time in one state. */
interface Span {
  from: number;
  to: number;
  state: DisplayValue;
}

function toSpans(time: Field, value: Field, merge: boolean): Span[] {
  const stepMs = time.config.interval ?? 0;
  const spans: Span[] = [];
  value.values.forEach((number, row) => {
    const at: number = time.values[row];
    const state = value.display!(number);
    const last = spans[spans.length - 1];
    if (merge && last && last.to === at && last.state.text === state.text) {
      last.to = at + stepMs;
    } else {
      spans.push({ from: at, to: at + stepMs, state });
    }
  });
  return spans;
}

interface Props {
  frames: DataFrame[];
  options: Record<string, any>;
  range: TimeRange;
  width: number;
  height: number;
}

/** A lane for each series, with its states over time. */
export function StateTimeline({ frames, options, range, width, height }: Props) {
  const theme = useTheme2();
  const lanes = frames
    .map((frame) => {
      const [time, value] = frame.fields;
      return {
        name: getFieldDisplayName(value, frame, frames),
        spans: toSpans(time, value, options.mergeValues),
        opacity: (value.config.custom?.fillOpacity ?? 70) / 100,
      };
    })
    // The first is on top.
    .reverse();
  const labels = lanes.map(({ name }, lane): [number, string] => [lane + 0.5, name]);
  const config = buildChart(range, theme, { count: lanes.length, labels }, (chart, context) => {
    const { left: start, width: across } = chart.bbox;
    const at = (time: number) =>
      Math.min(Math.max(chart.valToPos(time, 'x', true), start), start + across);
    const thick = (chart.bbox.height / lanes.length) * options.rowHeight;
    context.font = `${12 * devicePixelRatio}px ${theme.typography.fontFamily}`;
    context.textAlign = 'left';
    context.textBaseline = 'middle';
    lanes.forEach(({ spans, opacity }, lane) => {
      const middle = chart.valToPos(lane + 0.5, 'y', true);
      for (const { from, to, state } of spans) {
        const [left, right] = [at(from), at(to)];
        context.globalAlpha = opacity;
        context.fillStyle = state.color ?? theme.colors.text.primary;
        context.fillRect(left, middle - thick / 2, right - left, thick);
        const text = formattedValueToString(state);
        if (options.showValue !== 'never' && context.measureText(text).width + 8 < right - left) {
          context.globalAlpha = 1;
          context.fillStyle = theme.colors.text.primary;
          context.fillText(text, left + 4, middle);
        }
      }
    });
  });

  const states = new Map(
    lanes.flatMap(({ spans }) => spans.map(({ state }) => [formattedValueToString(state), state]))
  );
  const { showLegend, placement, displayMode } = options.legend;
  const legend = showLegend ? (
    <VizLayout.Legend placement={placement}>
      <VizLegend
        placement={placement}
        displayMode={displayMode}
        items={[...states].map(([label, { color }]) => ({ label, color, yAxis: 1 }))}
      />
    </VizLayout.Legend>
  ) : null;
  const data = [lanes.flatMap(({ spans }) => spans.map(({ from }) => from))];
  return (
    <VizLayout width={width} height={height} legend={legend}>
      {(chartWidth: number, chartHeight: number) => (
        <UPlotChart config={config} data={data as any} width={chartWidth} height={chartHeight} />
      )}
    </VizLayout>
  );
}
