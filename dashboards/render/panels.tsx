// The panels of a dashboard, as Grafana's panel plugins use the components of @grafana/ui.
import {
  type DataFrame,
  FieldType,
  type FieldConfigSource,
  type FieldDisplay,
  type GrafanaTheme2,
  type TimeRange,
  VizOrientation,
  getDisplayValueAlignmentFactors,
  getFieldDisplayValues,
  renderTextPanelMarkdown,
} from '@grafana/data';
import { BarGaugeDisplayMode, BigValueGraphMode, BigValueTextMode } from '@grafana/schema';
import {
  BarGauge,
  BigValue,
  Gauge,
  Table,
  TimeSeries,
  VizRepeater,
  type VizRepeaterRenderValueProps,
  useTheme2,
} from '@grafana/ui';

import { Heatmap } from './heatmap';
import { StateTimeline } from './timeline';

/** What a panel needs to be drawn. */
export interface PanelProps {
  type: string;
  title: string;
  frames: DataFrame[];
  source: FieldConfigSource;
  options: Record<string, any>;
  range: TimeRange;
  replace: (text: string) => string;
  width: number;
  height: number;
}

type ValueProps = VizRepeaterRenderValueProps<
  FieldDisplay,
  ReturnType<typeof getDisplayValueAlignmentFactors>
>;

const hasData = (frames: DataFrame[]) => frames.some((frame) => frame.length > 0);

export function NoData({ text = 'No data' }: { text?: string }) {
  const style = { display: 'flex', height: '100%', alignItems: 'center', justifyContent: 'center' };
  return <div style={style}>{text}</div>;
}

function displayValues(props: PanelProps, theme: GrafanaTheme2, sparkline = false) {
  const { source, options, frames, replace } = props;
  return getFieldDisplayValues({
    fieldConfig: source,
    reduceOptions: options.reduceOptions,
    replaceVariables: replace,
    theme,
    data: frames,
    sparkline,
    percentChange: options.showPercentChange,
    timeZone: 'utc',
  });
}

function Values({
  panel,
  values,
  render,
  ...layout
}: {
  panel: PanelProps;
  values: FieldDisplay[];
  render: (props: ValueProps) => JSX.Element;
  [layout: string]: unknown;
}) {
  return (
    <VizRepeater<FieldDisplay, ValueProps['alignmentFactors']>
      getValues={() => values}
      getAlignmentFactors={getDisplayValueAlignmentFactors}
      renderValue={render}
      width={panel.width}
      height={panel.height}
      source={panel.frames}
      renderCounter={0}
      orientation={panel.options.orientation as VizOrientation}
      {...layout}
    />
  );
}

function Stat(props: PanelProps) {
  const theme = useTheme2();
  const { options, source, range, title } = props;
  const values = displayValues(props, theme, options.graphMode !== BigValueGraphMode.None);
  const named =
    options.textMode === BigValueTextMode.Auto && (source.defaults.displayName || !title);
  const render = ({ value, alignmentFactors, width, height, count }: ValueProps) => (
    <BigValue
      value={value.display}
      count={count}
      sparkline={value.sparkline && { ...value.sparkline, timeRange: range }}
      colorMode={options.colorMode}
      graphMode={options.graphMode}
      justifyMode={options.justifyMode}
      textMode={named ? BigValueTextMode.ValueAndName : options.textMode}
      alignmentFactors={alignmentFactors}
      text={options.text}
      width={width}
      height={height}
      theme={theme}
      disableWideLayout={!options.wideLayout}
      percentChangeColorMode={options.percentChangeColorMode}
    />
  );
  return <Values panel={props} values={values} render={render} itemSpacing={3} autoGrid />;
}

function GaugePanel(props: PanelProps) {
  const theme = useTheme2();
  const { options } = props;
  const values = displayValues(props, theme);
  const render = ({ value, width, height, orientation, count }: ValueProps) => (
    <Gauge
      value={
        count === 1 && !props.source.defaults.displayName
          ? { ...value.display, title: undefined }
          : value.display
      }
      width={width}
      height={height}
      field={value.field}
      text={options.text}
      showThresholdLabels={options.showThresholdLabels}
      showThresholdMarkers={options.showThresholdMarkers}
      theme={theme}
      orientation={orientation}
    />
  );
  const least = { minVizWidth: options.minVizWidth, minVizHeight: options.minVizHeight };
  return <Values panel={props} values={values} render={render} {...least} autoGrid />;
}

function BarGaugePanel(props: PanelProps) {
  const theme = useTheme2();
  const { options } = props;
  const values = displayValues(props, theme);
  const itemSpacing = options.displayMode === BarGaugeDisplayMode.Lcd ? 2 : 10;
  const render = ({ value, alignmentFactors, orientation, width, height, count }: ValueProps) => (
    <BarGauge
      value={
        count === 1 && !props.source.defaults.displayName
          ? { ...value.display, title: undefined }
          : value.display
      }
      width={width}
      height={height}
      orientation={orientation}
      field={value.field}
      text={options.text}
      display={value.view?.getFieldDisplayProcessor(value.colIndex ?? 0)}
      theme={theme}
      itemSpacing={itemSpacing}
      displayMode={options.displayMode}
      alignmentFactors={count > 1 ? alignmentFactors : undefined}
      showUnfilled={options.showUnfilled}
      valueDisplayMode={options.valueMode}
      namePlacement={options.namePlacement}
    />
  );
  const layout = {
    itemSpacing,
    minVizWidth: options.minVizWidth,
    minVizHeight: options.minVizHeight,
    maxVizHeight: options.maxVizHeight,
  };
  return <Values panel={props} values={values} render={render} {...layout} />;
}

function TimeSeriesPanel({ frames, options, range, width, height }: PanelProps) {
  return (
    <TimeSeries
      frames={frames}
      structureRev={1}
      timeRange={range}
      timeZone="utc"
      width={width}
      height={height}
      legend={options.legend}
      options={options}
    />
  );
}

function TablePanel({ frames, source, options, range, width, height }: PanelProps) {
  const frame = frames[options.frameIndex] ?? frames[0];
  if (!frame.fields.some(({ type }) => type !== FieldType.time)) {
    return <NoData />;
  }
  return (
    <Table
      data={frame}
      width={width}
      height={height}
      noHeader={!options.showHeader}
      showTypeIcons={options.showTypeIcons}
      initialSortBy={options.sortBy}
      footerOptions={options.footer}
      cellHeight={options.cellHeight}
      timeRange={range}
      fieldConfig={source}
      resizable
    />
  );
}

function TextPanel({ options, replace }: PanelProps) {
  const content = replace(options.content);
  const html = options.mode === 'html' ? content : renderTextPanelMarkdown(content);
  return <div className="markdown-html" dangerouslySetInnerHTML={{ __html: html }} />;
}

/** Drawn here, as no package has them. */
export const STAND_INS = new Set(['heatmap', 'state-timeline']);

// These show "No data" themselves, or need none.
const WITHOUT_DATA = new Set(['stat', 'gauge', 'bargauge', 'text']);

const COMPONENTS: Record<string, (props: PanelProps) => JSX.Element> = {
  timeseries: TimeSeriesPanel,
  stat: Stat,
  gauge: GaugePanel,
  bargauge: BarGaugePanel,
  table: TablePanel,
  heatmap: Heatmap,
  'state-timeline': StateTimeline,
  text: TextPanel,
};

/** What is inside a panel. */
export function PanelContent(props: PanelProps) {
  const { type, frames, source } = props;
  if (!WITHOUT_DATA.has(type) && !hasData(frames)) {
    return <NoData text={source.defaults.noValue} />;
  }
  const Component = COMPONENTS[type];
  return <Component {...props} />;
}
