// Field configuration: the registry, the defaults of panel types, and transformations.
// Grafana's application fills these; @grafana/data applies them.
import {
  type DataFrame,
  type DataTransformerConfig,
  type FieldConfigPropertyItem,
  FieldConfigOptionsRegistry,
  type FieldConfigSource,
  type GrafanaTheme2,
  ThresholdsMode,
  applyFieldOverrides,
  booleanOverrideProcessor,
  dataLinksOverrideProcessor,
  displayNameOverrideProcessor,
  identityOverrideProcessor,
  numberOverrideProcessor,
  standardTransformers,
  standardTransformersRegistry,
  stringOverrideProcessor,
  thresholdsOverrideProcessor,
  transformDataFrame,
  unitOverrideProcessor,
  valueMappingsOverrideProcessor,
} from '@grafana/data';
import { lastValueFrom } from 'rxjs';

type Process = FieldConfigPropertyItem['process'];

const STANDARD: Record<string, Process> = {
  unit: unitOverrideProcessor,
  min: numberOverrideProcessor,
  max: numberOverrideProcessor,
  decimals: numberOverrideProcessor,
  displayName: displayNameOverrideProcessor,
  color: identityOverrideProcessor,
  noValue: stringOverrideProcessor,
  links: dataLinksOverrideProcessor,
  mappings: valueMappingsOverrideProcessor,
  thresholds: thresholdsOverrideProcessor,
  filterable: booleanOverrideProcessor,
  fieldMinMax: booleanOverrideProcessor,
};

const THRESHOLDS = {
  mode: ThresholdsMode.Absolute,
  steps: [
    { value: -Infinity, color: 'green' },
    { value: 80, color: 'red' },
  ],
};
const REDUCE = { calcs: ['lastNotNull'], fields: '', values: false };
const LEGEND = { showLegend: true, displayMode: 'list', placement: 'bottom', calcs: [] };

interface Defaults {
  color?: { mode: string };
  custom?: Record<string, unknown>;
  options?: Record<string, unknown>;
}

/** What Grafana's panel types assume where a dashboard says nothing. */
const DEFAULTS: Record<string, Defaults> = {
  timeseries: {
    color: { mode: 'palette-classic' },
    custom: {
      drawStyle: 'line',
      lineInterpolation: 'linear',
      lineWidth: 1,
      fillOpacity: 0,
      gradientMode: 'none',
      showPoints: 'auto',
      pointSize: 5,
      spanNulls: false,
      barAlignment: 0,
      barWidthFactor: 0.6,
      axisPlacement: 'auto',
      axisColorMode: 'text',
      axisBorderShow: false,
      axisLabel: '',
      scaleDistribution: { type: 'linear' },
      stacking: { mode: 'none', group: 'A' },
      thresholdsStyle: { mode: 'off' },
      hideFrom: { viz: false, legend: false, tooltip: false },
    },
    options: { legend: LEGEND },
  },
  stat: {
    options: {
      reduceOptions: REDUCE,
      orientation: 'auto',
      graphMode: 'area',
      colorMode: 'value',
      justifyMode: 'auto',
      textMode: 'auto',
      wideLayout: true,
      showPercentChange: false,
      percentChangeColorMode: 'standard',
    },
  },
  gauge: {
    options: {
      reduceOptions: REDUCE,
      orientation: 'auto',
      showThresholdLabels: false,
      showThresholdMarkers: true,
      sizing: 'auto',
      minVizWidth: 75,
      minVizHeight: 75,
    },
  },
  bargauge: {
    options: {
      reduceOptions: REDUCE,
      displayMode: 'gradient',
      orientation: 'auto',
      valueMode: 'color',
      namePlacement: 'auto',
      showUnfilled: true,
      sizing: 'auto',
      minVizWidth: 8,
      minVizHeight: 16,
      maxVizHeight: 300,
      legend: { ...LEGEND, showLegend: false },
    },
  },
  table: {
    custom: { align: 'auto', cellOptions: { type: 'auto' }, inspect: false },
    options: { showHeader: true, cellHeight: 'sm', frameIndex: 0 },
  },
  heatmap: {
    options: {
      calculate: false,
      color: { mode: 'scheme', scheme: 'Oranges', reverse: false },
      cellGap: 1,
      filterValues: { le: 1e-9 },
      legend: { show: true },
      yAxis: { axisPlacement: 'left' },
    },
  },
  'state-timeline': {
    custom: { fillOpacity: 70, lineWidth: 0 },
    options: { legend: LEGEND, mergeValues: true, rowHeight: 0.9, showValue: 'auto' },
  },
  text: { options: { mode: 'markdown', content: '' } },
};

/** Panel types that can be drawn. */
export const PANEL_TYPES = Object.keys(DEFAULTS);

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

function withDefaults<T>(given: T | undefined, defaults: unknown): T {
  if (!isObject(defaults)) {
    return (given ?? defaults) as T;
  }
  const merged: Record<string, unknown> = { ...defaults };
  for (const [key, value] of Object.entries(given ?? {})) {
    merged[key] = isObject(value)
      ? withDefaults(value, defaults[key] ?? {})
      : (value ?? defaults[key]);
  }
  return merged as T;
}

/** A panel's options, with the defaults of its type. */
export const optionsOf = (type: string, options: unknown): Record<string, any> =>
  withDefaults(options as Record<string, any>, DEFAULTS[type]?.options ?? {});

interface ThresholdSteps {
  steps?: Array<{ value: number | null }>;
}

/** The base step has no value in JSON, which has no minus infinity. */
function restoreBaseStep(thresholds: ThresholdSteps | undefined) {
  for (const step of thresholds?.steps ?? []) {
    step.value ??= -Infinity;
  }
}

/** A panel's field configuration, with the defaults of its type. */
export function fieldConfigOf(type: string, written: unknown): FieldConfigSource {
  const source = structuredClone(written ?? {}) as FieldConfigSource;
  const { color, custom } = DEFAULTS[type] ?? {};
  const defaults = withDefaults(source.defaults, {
    color: color ?? { mode: 'thresholds' },
    custom: custom ?? {},
  });
  defaults.thresholds ??= structuredClone(THRESHOLDS);
  restoreBaseStep(defaults.thresholds);
  const overrides = source.overrides ?? [];
  for (const { id, value } of overrides.flatMap(({ properties }) => properties)) {
    if (id === 'thresholds') {
      restoreBaseStep(value);
    }
  }
  return { defaults, overrides };
}

function makeRegistry(source: FieldConfigSource): FieldConfigOptionsRegistry {
  const item = (id: string, path: string, process: Process, isCustom: boolean) =>
    ({
      id,
      path,
      name: id,
      isCustom,
      process,
      override: () => null,
      editor: () => null,
      shouldApply: () => true,
      settings: id === 'displayName' ? { expandTemplateVars: true } : {},
    }) as unknown as FieldConfigPropertyItem;
  const custom = new Set(Object.keys(source.defaults.custom ?? {}));
  for (const { id } of source.overrides.flatMap(({ properties }) => properties)) {
    if (id.startsWith('custom.')) {
      custom.add(id.slice('custom.'.length));
    }
  }
  return new FieldConfigOptionsRegistry(() => [
    ...Object.entries(STANDARD).map(([id, process]) => item(id, id, process, false)),
    ...[...custom].map((path) => item(`custom.${path}`, path, identityOverrideProcessor, true)),
  ]);
}

// Some stand there under two names.
const transformers = new Map(
  Object.values(standardTransformers).map((transformation) => [transformation.id, transformation])
);
standardTransformersRegistry.setInit(() =>
  [...transformers].map(([id, transformation]) => ({
    id,
    name: transformation.name,
    transformation,
    editor: () => null,
  }))
);

/** Transforms a panel's frames and gives their fields names, units and colours. */
export async function prepareFrames(
  frames: DataFrame[],
  transformations: DataTransformerConfig[],
  source: FieldConfigSource,
  theme: GrafanaTheme2,
  replace: (text: string) => string
): Promise<DataFrame[]> {
  const wanted = transformations.filter(({ disabled }) => !disabled);
  for (const { id } of wanted) {
    if (!standardTransformersRegistry.getIfExists(id)) {
      throw new Error(`the transformation ${id} is not in @grafana/data`);
    }
  }
  const context = { interpolate: replace };
  const data = await lastValueFrom(transformDataFrame(wanted, frames, context));
  return applyFieldOverrides({
    data,
    fieldConfig: source,
    fieldConfigRegistry: makeRegistry(source),
    replaceVariables: replace,
    theme,
    timeZone: 'utc',
  });
}
