{{- define "chorus.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains "chorus" .Release.Name -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-chorus" .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end -}}
{{- end -}}

{{/* Labels that select the pods of a component. Takes {root, component}. */}}
{{- define "chorus.selector" -}}
app.kubernetes.io/name: chorus
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* All labels of an object. Takes {root, component}. */}}
{{- define "chorus.labels" -}}
{{ include "chorus.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Reference of an image, by digest if there is one. Takes {root, image, repository}. */}}
{{- define "chorus.image" -}}
{{- if .image.digest -}}
{{ .repository }}@{{ .image.digest }}
{{- else -}}
{{ .repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "chorus.engineRepository" -}}
{{ .Values.engine.image.repository | default (printf "chorus/engine-%s" .Values.engine.device) }}
{{- end -}}

{{/* Settings of every pod. The service account has no rights, and its token is not mounted. */}}
{{- define "chorus.pod" -}}
serviceAccountName: {{ include "chorus.fullname" . }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- if not (kindIs "invalid" .Values.runAsUser) }}
  runAsUser: {{ int .Values.runAsUser }}
  runAsGroup: {{ int .Values.runAsUser }}
  fsGroup: {{ int .Values.runAsUser }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
  seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* Placement of the pods of a component. Takes {root, component, values}. */}}
{{- define "chorus.placement" -}}
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{ include "chorus.selector" $ | nindent 8 }}
  {{- end }}
{{- end -}}

{{- define "chorus.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* The only directories that a container may write to. */}}
{{- define "chorus.scratchEnv" -}}
- {name: HOME, value: /tmp}
- {name: TMPDIR, value: /tmp}
- {name: USER, value: chorus} # a user without an entry in /etc/passwd has no name otherwise
{{- end -}}

{{- define "chorus.populationVolume" -}}
- name: population
  {{- if eq .Values.population.source "pvc" }}
  persistentVolumeClaim:
    claimName: {{ .Values.population.pvc.claimName }}
    readOnly: true
  {{- else }}
  emptyDir:
    sizeLimit: {{ mul 2 .Values.population.gib }}Gi
  {{- end }}
{{- end -}}

{{- define "chorus.populationMount" -}}
- name: population
  mountPath: /population
  readOnly: true
  {{- if eq .Values.population.source "pvc" }}
  {{- with .Values.population.pvc.subPath }}
  subPath: {{ . }}
  {{- end }}
  {{- end }}
{{- end -}}

{{/* The init container that fills the population's volume. Takes {root, component, resources}; gateways need only the manifest. */}}
{{- define "chorus.populationInit" -}}
{{- $values := .root.Values -}}
{{- $population := $values.population -}}
{{- if ne $population.source "pvc" }}
initContainers:
  - name: population
    {{- if eq $population.source "image" }}
    image: {{ required "population.image.reference is needed with population.source=image" $population.image.reference }}
    imagePullPolicy: {{ $population.image.pullPolicy }}
    {{- if $population.image.command }}
    command: {{ toJson $population.image.command }}
    {{- else if eq .component "gateway" }}
    command: [cp, {{ printf "%s/population.json" $population.image.path | quote }}, /to/]
    {{- else }}
    command: [cp, -R, {{ printf "%s/." $population.image.path | quote }}, /to/]
    {{- end }}
    env:
      {{- include "chorus.scratchEnv" .root | nindent 6 }}
      {{- with $population.image.env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- else }}
    image: {{ include "chorus.image" (dict "root" .root "image" $values.gateway.image "repository" $values.gateway.image.repository) }}
    imagePullPolicy: {{ $values.gateway.image.pullPolicy }}
    command: [chorus, population, fetch]
    args:
      - {{ required "population.url.address is needed with population.source=url" $population.url.address | quote }}
      - --sha256
      - {{ required "population.url.sha256 is needed with population.source=url" $population.url.sha256 | quote }}
      - --out
      - /to
      - --max-bytes
      - {{ mul 2147483648 $population.gib | quote }}
      {{- if eq .component "gateway" }}
      - --only-manifest
      {{- end }}
    env:
      {{- include "chorus.scratchEnv" .root | nindent 6 }}
      {{- with $population.url.existingSecret }}
      - name: CHORUS_FETCH_AUTHORIZATION
        valueFrom: {secretKeyRef: {name: {{ . }}, key: authorization}}
      {{- end }}
    {{- end }}
    {{- include "chorus.containerSecurity" .root | nindent 4 }}
    resources:
      requests: {cpu: 100m, memory: 256Mi}
      limits: {memory: 512Mi}
    volumeMounts:
      - {name: population, mountPath: /to}
      - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end -}}

{{/* Longest time from an engine's start until it answers, copying included. */}}
{{- define "chorus.startupSeconds" -}}
{{- if .Values.engine.startupSeconds -}}
{{ int .Values.engine.startupSeconds }}
{{- else -}}
{{ add 600 (mul 30 .Values.population.gib) }}
{{- end -}}
{{- end -}}

{{/* Port of the object store of `population.source=url`. */}}
{{- define "chorus.urlPort" -}}
{{- $url := urlParse .Values.population.url.address -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" -}}
{{- $port | default (ternary "443" "80" (eq $url.scheme "https")) -}}
{{- end -}}

{{/* Whether replicas are scaled. Takes {min, max}. */}}
{{- define "chorus.isScaled" -}}
{{- if lt (int .max) (int .min) }}
{{- fail (printf "replicas are at most %d, fewer than %d at least: give max as min, or more" (int .max) (int .min)) }}
{{- end }}
{{- if gt (int .max) (int .min) }}true{{ end -}}
{{- end -}}
