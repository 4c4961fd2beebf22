// What our dashboards may hold: Grafana's own types (npm @grafana/schema), with a panel's options and fields by its kind.
// test_dashboards.py makes a JSON schema of `OurDashboard`.
import type * as Heatmap from "@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen";
import type * as Stat from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as Table from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type * as TimeSeries from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";
// The package exports no path to the plain dashboard's types.
import type {
  AnnotationQuery,
  Dashboard,
  DataSourceRef,
  Panel,
  RowPanel,
} from "./node_modules/@grafana/schema/dist/types/raw/dashboard/x/types.gen";

/** Of the Prometheus data source, whose schema is not in the package. */
interface Query {
  refId: string;
  datasource: DataSourceRef;
  expr: string;
  legendFormat?: string;
  format?: "time_series" | "table" | "heatmap";
  instant?: boolean;
  range?: boolean;
}

type FieldConfig = NonNullable<Panel["fieldConfig"]>;

interface Shows<Kind, Options, Custom> extends Omit<Panel, "type" | "options" | "targets" | "fieldConfig"> {
  type: Kind;
  options: Partial<Options>;
  targets: Query[];
  fieldConfig: Omit<FieldConfig, "defaults"> & {
    defaults: Omit<FieldConfig["defaults"], "custom"> & { custom?: Partial<Custom> };
  };
}

export interface OurDashboard extends Omit<Dashboard, "panels" | "annotations"> {
  panels: (
    | RowPanel
    | Shows<"stat", Stat.Options, object>
    | Shows<"table", Table.Options, Table.FieldConfig>
    | Shows<"heatmap", Heatmap.Options, Heatmap.FieldConfig>
    | Shows<"timeseries", TimeSeries.Options, TimeSeries.FieldConfig>
  )[];
  annotations: { list: (Omit<AnnotationQuery, "target"> & { target: Query; titleFormat?: string })[] };
}
