// The arc of a gauge. Grafana's Gauge hands it to an old jQuery plugin that is in Grafana's server
// and in no package, so this draws it: the bar, the ring of thresholds, and the value.
import $ from 'jquery';

interface GaugeOptions {
  gauge: { min: number; max: number; width: number; background: { color: string } };
  threshold: {
    values: Array<{ value: number; color: string }>;
    show: boolean;
    width: number;
    label: { show: boolean; margin: number; font: { size: number } };
  };
  value: { color: string; formatter: () => string; font: { size: number; family: string } };
}

// From lower left over the top to lower right.
const START = 0.8 * Math.PI;
const SWEEP = 1.4 * Math.PI;

function drawGauge(element: HTMLElement, value: number, options: GaugeOptions) {
  const { gauge, threshold, value: text } = options;
  const { clientWidth: width, clientHeight: height } = element;
  const canvas = document.createElement('canvas');
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  canvas.style.cssText = `width: ${width}px; height: ${height}px`;
  element.replaceChildren(canvas);
  const context = canvas.getContext('2d')!;
  context.scale(devicePixelRatio, devicePixelRatio);

  const labels = threshold.label.show ? threshold.label.font.size * 2 : 0;
  // Below the middle the arc ends at this share of its radius.
  const depth = Math.sin(START);
  const radius = Math.min(width / 2, height / (1 + depth)) - 2 - labels;
  const [x, y] = [width / 2, (height - radius * (1 + depth)) / 2 + radius];
  const angle = (at: number) => {
    const share = (at - gauge.min) / (gauge.max - gauge.min || 1);
    return START + SWEEP * Math.min(Math.max(share, 0), 1);
  };
  const arc = (from: number, to: number, outer: number, thickness: number, color: string) => {
    context.beginPath();
    context.arc(x, y, outer, from, to);
    context.arc(x, y, outer - thickness, to, from, true);
    context.fillStyle = color;
    context.fill();
  };

  const ring = threshold.show ? threshold.width + 1 : 0;
  arc(START, START + SWEEP, radius - ring, gauge.width, gauge.background.color);
  arc(START, angle(value), radius - ring, gauge.width, text.color);
  context.textAlign = 'center';
  context.textBaseline = 'middle';
  threshold.values.forEach((step, index) => {
    const from = threshold.values[index - 1];
    if (threshold.show && from) {
      arc(angle(from.value), angle(step.value), radius, threshold.width, step.color);
    }
    if (threshold.label.show) {
      const at = angle(step.value);
      const out = radius + threshold.label.font.size;
      context.fillStyle = step.color;
      context.font = `${threshold.label.font.size}px ${text.font.family}`;
      context.fillText(`${step.value}`, x + Math.cos(at) * out, y + Math.sin(at) * out);
    }
  });
  context.fillStyle = text.color;
  context.font = `500 ${text.font.size}px ${text.font.family}`;
  context.fillText(text.formatter(), x, y);
}

Object.assign($, {
  plot: (
    element: HTMLElement,
    [{ data }]: Array<{ data: Array<[number, number]> }>,
    { series }: { series: { gauges: GaugeOptions } }
  ) => drawGauge(element, data[0][1], series.gauges),
});
