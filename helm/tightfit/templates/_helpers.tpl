{{/* Names end at 40 characters: KubeRay appends to the cluster's name, and shortens from the front what is over 50. */}}
{{- define "tightfit.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Of the instance; never change, as selectors are immutable. */}}
{{- define "tightfit.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "tightfit.labels" -}}
{{ include "tightfit.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
{{- end -}}

{{- define "tightfit.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "tightfit.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "tightfit.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{/* KubeRay's name for the Service of the head. */}}
{{- define "tightfit.rayAddress" -}}
{{ include "tightfit.fullname" . }}-head-svc:6379
{{- end -}}

{{- define "tightfit.claim" -}}
{{- default (printf "%s-models" (include "tightfit.fullname" .)) .Values.models.existingClaim -}}
{{- end -}}

{{/* "cpu" or "cuda": the kind of device of every pool; validated to be one. */}}
{{- define "tightfit.device" -}}
{{- $device := "cuda" -}}
{{- range .Values.pools -}}
{{- if eq "cpu" (include "tightfit.kind" (dict "root" $ "type" .devices.type)) }}{{ $device = "cpu" }}{{ end -}}
{{- end -}}
{{- $device -}}
{{- end -}}

{{/* "cpu" or "gpu", of a type of device. */}}
{{- define "tightfit.kind" -}}
{{- $type := get (default dict .root.Values.deviceTypes) .type | default dict -}}
{{- $type.kind | default "gpu" -}}
{{- end -}}

{{/* Devices of all pools. */}}
{{- define "tightfit.devices" -}}
{{- $devices := 0 -}}
{{- range .Values.pools -}}
{{- $devices = add $devices (mul (int (default 1 .nodes)) (int (default 1 .devices.count))) -}}
{{- end -}}
{{- $devices -}}
{{- end -}}
