{{- define "hemostat.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 53 | trimAll "-." -}}
{{- end -}}

{{- define "hemostat.fullname" -}}
{{- $name := include "hemostat.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- $name = .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- $name = .Release.Name -}}
{{- else -}}
{{- $name = printf "%s-%s" .Release.Name $name -}}
{{- end -}}
{{- /* A release's name may contain a dot, a Service's may not; 53 characters leave room for a suffix. */ -}}
{{- $name | replace "." "-" | trunc 53 | trimAll "-" -}}
{{- end -}}

{{- define "hemostat.selectorLabels" -}}
app.kubernetes.io/name: {{ include "hemostat.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{/* Selects the pods with the control process: all pods, where relays have none of their own. */}}
{{- define "hemostat.controlLabels" -}}
{{ include "hemostat.selectorLabels" . }}
{{- if .Values.relays.enabled }}
app.kubernetes.io/component: control
{{- end }}
{{- end -}}

{{/* Selects the pods that take requests. */}}
{{- define "hemostat.relayLabels" -}}
{{ include "hemostat.selectorLabels" . }}
{{- if .Values.relays.enabled }}
app.kubernetes.io/component: relay
{{- end }}
{{- end -}}

{{- define "hemostat.controlHost" -}}
{{- printf "%s-control.%s.svc" (include "hemostat.fullname" .) .Release.Namespace -}}
{{- end -}}

{{- define "hemostat.tlsSecret" -}}
{{- default (printf "%s-tls" (include "hemostat.fullname" .)) .Values.relays.tlsSecret -}}
{{- end -}}

{{/* Labels that identify the chart's objects take precedence over `extra`, because selectors use them. */}}
{{- define "hemostat.labels" -}}
{{- $own := include "hemostat.selectorLabels" .root | fromYaml -}}
{{- $own = merge $own (dict
  "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_")
  "app.kubernetes.io/version" .root.Chart.AppVersion
  "app.kubernetes.io/managed-by" .root.Release.Service
) -}}
{{- toYaml (merge $own (default dict .extra) (default dict .root.Values.commonLabels)) -}}
{{- end -}}

{{/* The metadata of every object. Arguments: root; optional: suffix (of the name), namespace, labels, annotations */}}
{{- define "hemostat.metadata" -}}
name: {{ printf "%s%s" (include "hemostat.fullname" .root) (default "" .suffix) | quote }}
namespace: {{ default .root.Release.Namespace .namespace | quote }}
labels:
  {{- include "hemostat.labels" (dict "root" .root "extra" .labels) | nindent 2 }}
{{- with merge (dict) (default dict .annotations) (default dict .root.Values.commonAnnotations) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "hemostat.serviceAccountName" -}}
{{- default (ternary (include "hemostat.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "hemostat.secretName" -}}
{{- default (include "hemostat.fullname" .) .Values.existingSecret -}}
{{- end -}}

{{/* image: repository, tag, digest; default: the tag if image has none */}}
{{- define "hemostat.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (default .default .image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "hemostat.loopback" -}}
{{- ternary "[::1]" "127.0.0.1" (contains ":" .Values.bindAddress) -}}
{{- end -}}

{{/* The address that the control process and engines of this release have, of what is called so: admin, engine, reference */}}
{{- define "hemostat.host" -}}
{{- printf "%s-%s.%s.svc" (include "hemostat.fullname" .root) .name .root.Release.Namespace -}}
{{- end -}}

{{- define "hemostat.upstreamUrl" -}}
{{- if .Values.upstream.urls -}}
{{- join ", " .Values.upstream.urls -}}
{{- else if .Values.upstream.url -}}
{{- .Values.upstream.url -}}
{{- else if and .Values.engine.enabled .Values.engine.separate -}}
{{- printf "dns+http://%s:8000" (include "hemostat.host" (dict "root" . "name" "engine")) -}}
{{- else if .Values.engine.enabled -}}
{{- printf "http://%s:8000" (include "hemostat.loopback" .) -}}
{{- end -}}
{{- end -}}

{{/* Where the plugin in vLLM reports to; with relays of their own, every control process. */}}
{{- define "hemostat.adminUrl" -}}
{{- printf "%shttp://%s:%v" (ternary "dns+" "" .Values.relays.enabled) (include "hemostat.host" (dict "root" . "name" "admin")) .Values.service.adminPort -}}
{{- end -}}

{{/* Name of the port that clients use, of the Service and of the pod. */}}
{{- define "hemostat.dataPort" -}}
{{- ternary "https" "http" .Values.tls.enabled -}}
{{- end -}}

{{- define "hemostat.topK" -}}
{{- (default dict (default dict .Values.config).shadow).top_k | default 20 -}}
{{- end -}}

{{/* Labels of pods that are none of Hemostat: no selector of it finds them. Arguments: root, name (engine, reference, test) */}}
{{- define "hemostat.otherLabels" -}}
app.kubernetes.io/name: {{ printf "%s-%s" (include "hemostat.name" .root) .name | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .name }}
{{- end -}}

{{/* Keys that the Secret always has. */}}
{{- define "hemostat.tokens" -}}
[admin-token, engine-token{{ if .Values.relays.enabled }}, relay-token{{ end }}]
{{- end -}}

{{/* Key in the Secret -> variable of `hemostat serve`. */}}
{{- define "hemostat.secretVariables" -}}
admin-token: HEMOSTAT_ADMIN__TOKEN
engine-token: HEMOSTAT_ADMIN__ENGINE_TOKEN
reference-api-key: HEMOSTAT_REFERENCE__API_KEY
{{- if .Values.relays.enabled }}
relay-token: HEMOSTAT_CONTROL__TOKEN
{{- end }}
store-url: HEMOSTAT_STORE__URL
upstream-api-key: HEMOSTAT_UPSTREAM__API_KEY
{{- end -}}

{{/* Splits the value `config` into `secrets`, by their key in the Secret, and `config`, the rest, for the file. */}}
{{- define "hemostat.split" -}}
{{- $config := deepCopy (default dict .Values.config) -}}
{{- $secrets := dict -}}
{{- range $key, $path := dict
  "admin-token" (list "admin" "token")
  "engine-token" (list "admin" "engine_token")
  "reference-api-key" (list "reference" "api_key")
  "store-url" (list "store" "url")
  "upstream-api-key" (list "upstream" "api_key")
-}}
{{- $section := default dict (get $config (first $path)) -}}
{{- $value := default "" (get $section (last $path)) -}}
{{- if and $value (or (ne $key "store-url") (regexMatch "^[a-z]+://[^/]*@" $value)) -}}
{{- $_ := set $secrets $key $value -}}
{{- $_ = unset $section (last $path) -}}
{{- end -}}
{{- end -}}
{{- $fixed := dict
  "upstream" (ternary (dict "urls" .Values.upstream.urls) (dict "url" (include "hemostat.upstreamUrl" .)) (not (empty .Values.upstream.urls)))
  "listen" (dict "host" (ternary (include "hemostat.loopback" . | trimAll "[]") .Values.bindAddress .Values.tls.enabled) "port" 8080)
  "admin" (dict "host" .Values.bindAddress "port" 8081)
-}}
{{- if .Values.relays.enabled -}}
{{- $files := dict "ca" "/etc/hemostat-tls/ca.crt" "cert" "/etc/hemostat-tls/tls.crt" "key" "/etc/hemostat-tls/tls.key" -}}
{{- $listen := printf "%s:8082" (ternary (printf "[%s]" .Values.bindAddress) .Values.bindAddress (contains ":" .Values.bindAddress)) -}}
{{- $_ := set $fixed "control" (merge $files (dict "listen" $listen "addresses" (list (printf "%s:8082" (include "hemostat.controlHost" .))))) -}}
{{- end -}}
{{- if .Values.reference.enabled -}}
{{- $_ := set $fixed "reference" (dict "backend" "vllm" "url" (printf "http://%s:8000" (include "hemostat.host" (dict "root" . "name" "reference")))) -}}
{{- end -}}
{{- if .Values.tls.enabled -}}
{{- /* All clients have the sidecar's address: the limit of one address is that of all. */ -}}
{{- $limits := default dict $config.limits -}}
{{- $_ := set $config "limits" (merge $limits (dict "connections_per_client" 16384)) -}}
{{- end -}}
{{- $config = mustMergeOverwrite $config $fixed -}}
{{- with $config.admin.allowed_hosts -}}
{{- /* If the port accepts listed host names only, add those of its Service. */ -}}
{{- $host := printf "%s-admin" (include "hemostat.fullname" $) -}}
{{- $names := list $host -}}
{{- range list "" ".svc" ".svc.cluster.local" }}{{ $names = append $names (printf "%s.%s%s" $host $.Release.Namespace .) }}{{ end -}}
{{- range ternary $.Values.adminIngress.hosts list $.Values.adminIngress.enabled }}{{ $names = append $names .host }}{{ end -}}
{{- $_ := set $config.admin "allowed_hosts" (concat . $names | uniq) -}}
{{- end -}}
{{- toYaml (dict "secrets" $secrets "config" $config) -}}
{{- end -}}

{{- define "hemostat.config" -}}
{{- toYaml (include "hemostat.split" . | fromYaml).config -}}
{{- end -}}

{{/* Longest drain after SIGTERM, in whole seconds. */}}
{{- define "hemostat.shutdownSeconds" -}}
{{- $config := default dict .Values.config -}}
{{- ternary $config.shutdown_seconds 30 (and (hasKey $config "shutdown_seconds") (ne $config.shutdown_seconds nil)) | ceil | int -}}
{{- end -}}

{{/* The sleep before SIGTERM, the drain, and the time that the supervisor then gives the relays (5 s) and the control process (10 s). */}}
{{- define "hemostat.graceSeconds" -}}
{{- add .Values.preStopSleepSeconds (include "hemostat.shutdownSeconds" .) 20 -}}
{{- end -}}

{{/* "true" where adapters are made in the pod. */}}
{{- define "hemostat.makesAdapters" -}}
{{- eq (toString (default dict (default dict .Values.config).adapter).enabled) "true" -}}
{{- end -}}

{{/* `resources`, with the limit of memory where that is empty. The process that makes adapters may take `memory_mib` on top
of what Hemostat takes; 2 GiB are for the copies of the models. */}}
{{- define "hemostat.resources" -}}
{{- $resources := deepCopy (default dict .Values.resources) -}}
{{- $limits := default dict $resources.limits -}}
{{- if and (hasKey $limits "memory") (eq (toString $limits.memory) "") -}}
{{- $memory := "2Gi" -}}
{{- if eq (include "hemostat.makesAdapters" .) "true" -}}
{{- $memory = printf "%dMi" (add 4096 (int64 (default 4096 .Values.config.adapter.memory_mib))) -}}
{{- end -}}
{{- $_ := set $limits "memory" $memory -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "hemostat.urlPort" -}}
{{- $url := urlParse . -}}
{{- $port := regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) -}}
{{- default (get (dict "http" "80" "https" "443") $url.scheme | default "5432") $port -}}
{{- end -}}

{{/* The destination of an address, as a list of NetworkPolicyPeers; empty: not known. */}}
{{- define "hemostat.peers" -}}
{{- $host := (urlParse .).hostname -}}
{{- $namespace := regexReplaceAll "^.+\\.([^.]+)\\.svc(?:\\..*)?$" $host "$1" -}}
{{- if not $host -}}
{{- else if regexMatch "^[0-9]+(\\.[0-9]+){3}$" $host -}}
- ipBlock: {cidr: "{{ $host }}/32"}
{{- else if contains ":" $host -}}
- ipBlock: {cidr: "{{ $host }}/128"}
{{- else if not (contains "." $host) -}}
- podSelector: {}
{{- else if ne $namespace $host -}}
- namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: {{ $namespace | quote }}}}
{{- end -}}
{{- end -}}

{{/* One egress rule. Arguments: comment, url, rule (its `to` and `ports` take precedence over the url), protocols */}}
{{- define "hemostat.egress" -}}
{{- $rule := default dict .rule -}}
# {{ .comment }}
- ports:
    {{- range $port := default (list (include "hemostat.urlPort" (default "" .url))) $rule.ports }}
    {{- range default (list "TCP") $.protocols }}
    - port: {{ $port }}
      protocol: {{ . }}
    {{- end }}
    {{- end }}
  {{- with default (include "hemostat.peers" (default "" .url) | fromYamlArray) $rule.to }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* The text of a value, which may be 0; empty for null. */}}
{{- define "hemostat.some" -}}
{{- if not (kindIs "invalid" .) }}{{ . }}{{ end -}}
{{- end -}}

{{/* Checks that a JSON schema cannot express. */}}
{{- define "hemostat.validate" -}}
{{- $split := include "hemostat.split" . | fromYaml -}}
{{- if and .Values.existingSecret $split.secrets -}}
{{- fail (printf "config: %s: must be in the Secret %s (existingSecret), not in the values" (keys $split.secrets | sortAlpha | join ", ") .Values.existingSecret) -}}
{{- end -}}
{{- if regexMatch "^[0-9]" (include "hemostat.fullname" .) -}}
{{- fail (printf "fullnameOverride: required, because the release's name %q begins with a digit, and a Service's name must not" .Release.Name) -}}
{{- end -}}
{{- if regexMatch "^(127\\.|::1$)" .Values.bindAddress -}}
{{- fail (printf "bindAddress: %s is the pod's loopback address, which neither clients nor probes can reach" .Values.bindAddress) -}}
{{- end -}}
{{- range $key, $url := dict
  "upstream.url" .Values.upstream.url
  "config.reference.url" (default dict $split.config.reference).url
  "config.store.url" (default dict (default dict .Values.config).store).url
  "config.tracing.endpoint" (default dict $split.config.tracing).endpoint
-}}
{{- $host := regexReplaceAll "^[a-z]+://([^/]*@)?([^/?#]*).*$" (default "" $url) "$2" -}}
{{- $port := regexFind "[0-9]+$" (regexFind ":[0-9]+$" $host) -}}
{{- if and $port (or (gt (atoi $port) 65535) (eq (atoi $port) 0)) -}}
{{- fail (printf "%s: %s is not a port number (1 to 65535)" $key $port) -}}
{{- end -}}
{{- end -}}
{{- $grace := include "hemostat.graceSeconds" . | int -}}
{{- with .Values.terminationGracePeriodSeconds -}}
{{- if lt (int .) $grace -}}
{{- fail (printf "terminationGracePeriodSeconds: %v is less than preStopSleepSeconds, config.shutdown_seconds and 20 s, which is %d" . $grace) -}}
{{- end -}}
{{- end -}}
{{- if eq .Values.service.type "ClusterIP" -}}
{{- range $key := list "nodePort" "externalTrafficPolicy" "loadBalancerSourceRanges" -}}
{{- if get $.Values.service $key -}}
{{- fail (printf "service.%s: has no effect with service.type ClusterIP; remove it, or set service.type" $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- /* Variables take precedence over the file, and the later of two over the first: the probes would use a wrong port. */ -}}
{{- $own := dict "HEMOSTAT_UPSTREAM__URL" "upstream.url" "HEMOSTAT_UPSTREAM__URLS" "upstream.urls" "HEMOSTAT_LISTEN__HOST" "bindAddress" "HEMOSTAT_ADMIN__HOST" "bindAddress" -}}
{{- $own = merge $own (dict "HEMOSTAT_LISTEN__PORT" "service.port" "HEMOSTAT_ADMIN__PORT" "service.adminPort") -}}
{{- range $key, $variable := include "hemostat.secretVariables" . | fromYaml -}}
{{- if or $.Values.existingSecret (has $key (include "hemostat.tokens" $ | fromYamlArray)) (hasKey $split.secrets $key) -}}
{{- $_ := set $own $variable (printf "%s in the Secret" $key) -}}
{{- end -}}
{{- end -}}
{{- range $variable := .Values.extraEnv -}}
{{- with get $own $variable.name -}}
{{- fail (printf "extraEnv: %s: set by the chart; use %s" $variable.name .) -}}
{{- end -}}
{{- end -}}
{{- $sidecar := and .Values.engine.enabled (not .Values.engine.separate) -}}
{{- if and .Values.relays.enabled $sidecar -}}
{{- fail "relays.enabled: does not go with an engine in the pod, which no other pod can reach; set engine.separate, or give upstream.url" -}}
{{- end -}}
{{- if .Values.reference.enabled -}}
{{- $given := default dict (default dict .Values.config).reference -}}
{{- range $key := list "url" "models" -}}
{{- if get $given $key -}}
{{- fail (printf "config.reference.%s: does not go with reference.enabled, which sets the reference; leave one of them out" $key) -}}
{{- end -}}
{{- end -}}
{{- if eq (toString $given.backend) "transformers" -}}
{{- fail "config.reference.backend: transformers does not go with reference.enabled, which is a vLLM; leave one of them out" -}}
{{- end -}}
{{- end -}}
{{- $reserved := list "config" "tmp" "data" "shm" "tls" "data-tls" -}}
{{- $volumes := list "config" "tmp" "tls" "data-tls" -}}
{{- if .Values.persistence.enabled }}{{ $volumes = append $volumes "data" }}{{ end -}}
{{- if $sidecar }}{{ $volumes = append $volumes "shm" }}{{ end -}}
{{- range .Values.extraVolumes -}}
{{- if has .name $reserved -}}
{{- fail (printf "extraVolumes: %s is used by the chart; choose another name" .name) -}}
{{- else if has .name $volumes -}}
{{- fail (printf "extraVolumes: %s: duplicate name" .name) -}}
{{- end -}}
{{- $volumes = append $volumes .name -}}
{{- end -}}
{{- $data := ternary (list "/data") list .Values.persistence.enabled -}}
{{- range $key, $mounted := dict
  "extraVolumeMounts" (dict "mounts" .Values.extraVolumeMounts "taken" (concat (list "/etc/hemostat" "/tmp") $data) "in" "extraVolumes")
  "engine.volumeMounts" (dict "mounts" (ternary .Values.engine.volumeMounts list .Values.engine.enabled) "taken" (list "/dev/shm") "in" (ternary "engine.volumes" "extraVolumes" .Values.engine.separate))
  "reference.volumeMounts" (dict "mounts" (ternary .Values.reference.volumeMounts list .Values.reference.enabled) "taken" (list "/dev/shm") "in" "reference.volumes")
-}}
{{- $taken := $mounted.taken -}}
{{- $there := $volumes -}}
{{- if ne $mounted.in "extraVolumes" -}}
{{- $there = list "shm" -}}
{{- range (get $.Values (trimSuffix ".volumes" $mounted.in)).volumes }}{{ $there = append $there .name }}{{ end -}}
{{- end -}}
{{- range $mounted.mounts -}}
{{- $path := trimSuffix "/" .mountPath -}}
{{- if has $path $taken -}}
{{- fail (printf "%s: %s: duplicate mount path" $key .mountPath) -}}
{{- else if not (has .name $there) -}}
{{- fail (printf "%s: there is no volume %s; add it to %s" $key .name $mounted.in) -}}
{{- end -}}
{{- $taken = append $taken $path -}}
{{- end -}}
{{- end -}}
{{- $names := list "hemostat" "engine" "tls" -}}
{{- range concat (default list .Values.initContainers) (default list .Values.extraContainers) -}}
{{- if has .name $names -}}
{{- fail (printf "initContainers, extraContainers: %s: duplicate container name; choose another name" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- $elsewhere := ne (default .Release.Namespace .Values.serviceMonitor.namespace) .Release.Namespace -}}
{{- if and .Values.serviceMonitor.enabled $elsewhere $split.config.admin.metrics_need_token -}}
{{- fail (printf "serviceMonitor.namespace: %s has no Secret with the token, which config.admin.metrics_need_token requires; leave it empty" .Values.serviceMonitor.namespace) -}}
{{- end -}}
{{- if and (include "hemostat.some" .Values.podDisruptionBudget.minAvailable) (include "hemostat.some" .Values.podDisruptionBudget.maxUnavailable) -}}
{{- fail "podDisruptionBudget: minAvailable and maxUnavailable cannot both be set" -}}
{{- end -}}
{{- if .Values.engine.enabled -}}
{{- if and .Values.engine.separate (or .Values.upstream.url .Values.upstream.urls) -}}
{{- fail "upstream.url, upstream.urls: with engine.separate the chart sets them; leave them empty" -}}
{{- end -}}
{{- if and $sidecar (not (regexMatch "^http://(127\\.0\\.0\\.1|localhost|\\[::1\\]):8000/?$" (include "hemostat.upstreamUrl" .))) -}}
{{- fail (printf "upstream.url: %s is not the engine in the pod; leave it empty, or set engine.enabled to false" .Values.upstream.url) -}}
{{- end -}}
{{- range .Values.engine.args -}}
{{- $flag := regexReplaceAll "=.*$" . "" | replace "_" "-" -}}
{{- if has $flag (list "--host" "--port" "--max-logprobs" "--logits-processors") -}}
{{- fail (printf "engine.args: the chart sets %s (from bindAddress, engine.maxLogprobs and Hemostat's plugin)" $flag) -}}
{{- end -}}
{{- if and $.Values.engine.adapters.enabled (has $flag (list "--enable-lora" "--max-loras" "--max-lora-rank")) -}}
{{- fail (printf "engine.args: the chart sets %s (from engine.adapters)" $flag) -}}
{{- end -}}
{{- end -}}
{{- $topK := include "hemostat.topK" . -}}
{{- if gt (int $topK) (int .Values.engine.maxLogprobs) -}}
{{- fail (printf "engine.maxLogprobs: %v is less than config.shadow.top_k, %v" .Values.engine.maxLogprobs $topK) -}}
{{- end -}}
{{- end -}}
{{- range ternary .Values.reference.args list .Values.reference.enabled -}}
{{- $flag := regexReplaceAll "=.*$" . "" | replace "_" "-" -}}
{{- if has $flag (list "--host" "--port" "--max-logprobs") -}}
{{- fail (printf "reference.args: the chart sets %s (from bindAddress and config.shadow.top_k)" $flag) -}}
{{- end -}}
{{- end -}}
{{- /* The root file system is read-only. */ -}}
{{- $mounts := list "/tmp" -}}
{{- if .Values.persistence.enabled }}{{ $mounts = append $mounts "/data" }}{{ end -}}
{{- range .Values.extraVolumeMounts }}{{ $mounts = append $mounts .mountPath }}{{ end -}}
{{- $store := default "" (default dict $split.config.store).url -}}
{{- $written := dict "config.records.path" (default "" (default dict $split.config.records).path) -}}
{{- $spool := default "" (default dict $split.config.spool).path -}}
{{- if not (contains "://" $spool) -}}
{{- $_ := set $written "config.spool.path" $spool -}}
{{- else if not .Values.persistence.enabled -}}
{{- fail "config.spool.path: until they are in the object store, requests are on a volume at /data; set persistence.enabled" -}}
{{- end -}}
{{- if hasPrefix "sqlite:///" $store }}{{ $_ := set $written "config.store.url" (trimPrefix "sqlite:///" $store) }}{{ end -}}
{{- range $key, $path := $written -}}
{{- $ok := eq $path "" -}}
{{- range $mounts }}{{ $ok = or $ok (hasPrefix (printf "%s/" (trimSuffix "/" .)) $path) }}{{ end -}}
{{- if not $ok -}}
{{- fail (printf "%s: %s is not on a volume: use a path below /data (four slashes in sqlite:////data/…) with persistence.enabled, or below one of extraVolumeMounts" $key $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A container that runs vLLM. Arguments: root; name; of: its values; args, env: lists */}}
{{- define "hemostat.vllm" -}}
- name: {{ .name }}
  image: {{ include "hemostat.image" (dict "image" .of.image "default" .root.Chart.AppVersion) | quote }}
  imagePullPolicy: {{ .of.image.pullPolicy }}
  command: [vllm, serve]
  args:
    {{- toYaml (concat (list .of.model "--host" .root.Values.bindAddress "--port" "8000") .args (default list .of.args)) | nindent 4 }}
  {{- with concat .env (default list .of.env) }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  ports:
    - name: {{ .name }}
      containerPort: 8000
      protocol: TCP
  startupProbe:
    httpGet:
      path: /health
      port: {{ .name }}
    periodSeconds: 10
    failureThreshold: 180
  readinessProbe:
    httpGet:
      path: /health
      port: {{ .name }}
    periodSeconds: 10
    failureThreshold: 3
  {{- with .of.resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .of.securityContext }}
  securityContext:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  volumeMounts:
    - name: shm
      mountPath: /dev/shm
    {{- with .of.volumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* The container of an engine, with Hemostat's plugin. Arguments: root; admin: where the plugin reports to */}}
{{- define "hemostat.engine" -}}
{{- $of := .root.Values.engine -}}
{{- $args := list "--max-logprobs" (toString $of.maxLogprobs) "--logits-processors" "hemostat_engine:LogitsProcessor" -}}
{{- $token := dict "secretKeyRef" (dict "name" (include "hemostat.secretName" .root) "key" "engine-token") -}}
{{- $env := list (dict "name" "HEMOSTAT_ADMIN_URL" "value" .admin) (dict "name" "HEMOSTAT_ENGINE_TOKEN" "valueFrom" $token) -}}
{{- with $of.adapters -}}
{{- if .enabled -}}
{{- $args = concat $args (list "--enable-lora" "--max-loras" (toString .maxLoras) "--max-lora-rank" (toString .maxLoraRank)) -}}
{{- $env = concat $env (list (dict "name" "HEMOSTAT_ADAPTERS" "value" "1") (dict "name" "VLLM_ALLOW_RUNTIME_LORA_UPDATING" "value" "True")) -}}
{{- end -}}
{{- end -}}
{{- include "hemostat.vllm" (dict "root" .root "name" "engine" "of" $of "args" $args "env" $env) -}}
{{- end -}}

{{/* The sidecar that decrypts, of a pod that takes requests. */}}
{{- define "hemostat.tlsContainer" -}}
# It runs before Hemostat starts and until it has drained.
- name: tls
  restartPolicy: Always
  image: {{ include "hemostat.image" (dict "image" .Values.tls.image "default" "") | quote }}
  imagePullPolicy: {{ .Values.tls.image.pullPolicy }}
  command: [nginx, -e, stderr, -c, /etc/hemostat/nginx.conf]
  ports:
    - name: https
      containerPort: 8443
      protocol: TCP
  {{- with .Values.tls.resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.securityContext }}
  securityContext:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  volumeMounts:
    - name: config
      mountPath: /etc/hemostat
      readOnly: true
    - name: data-tls
      mountPath: /etc/hemostat-data-tls
      readOnly: true
    - name: tmp
      mountPath: /tmp
      subPath: nginx
{{- end -}}
