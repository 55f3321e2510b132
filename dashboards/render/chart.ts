// What the two stand-ins for Grafana's own panels share: a chart over time on uPlot.
import { type GrafanaTheme2, type TimeRange } from '@grafana/data';
import { AxisPlacement, ScaleDirection, ScaleOrientation } from '@grafana/schema';
import { UPlotConfigBuilder } from '@grafana/ui';
import type uPlot from 'uplot';

/** The vertical axis: lanes from 0 up, with a label at some heights. */
interface Lanes {
  count: number;
  /** `[height, label]` */
  labels: Array<[number, string]>;
}

/** A chart with axes, whose inside `paint` draws. */
export function buildChart(
  range: TimeRange,
  theme: GrafanaTheme2,
  { count, labels }: Lanes,
  paint: (chart: uPlot, context: CanvasRenderingContext2D) => void
): UPlotConfigBuilder {
  const builder = new UPlotConfigBuilder('utc');
  builder.addScale({
    scaleKey: 'x',
    orientation: ScaleOrientation.Horizontal,
    direction: ScaleDirection.Right,
    isTime: true,
    range: () => [range.from.valueOf(), range.to.valueOf()],
  });
  builder.addAxis({
    scaleKey: 'x',
    isTime: true,
    placement: AxisPlacement.Bottom,
    timeZone: 'utc',
    theme,
  });
  builder.addScale({
    scaleKey: 'y',
    orientation: ScaleOrientation.Vertical,
    direction: ScaleDirection.Up,
    range: () => [0, count],
  });
  builder.addAxis({
    scaleKey: 'y',
    placement: AxisPlacement.Left,
    theme,
    grid: { show: false },
    ticks: { show: false },
    splits: () => labels.map(([height]) => height),
    values: () => labels.map(([, label]) => label),
  });
  builder.addHook('draw', (chart) => {
    const { ctx, bbox } = chart;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    paint(chart, ctx);
    ctx.restore();
  });
  return builder;
}
