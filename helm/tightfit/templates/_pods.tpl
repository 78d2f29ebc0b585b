{{/* Parts that all pods of the chart have. */}}
{{- define "tightfit.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int .Values.podSecurity.userId }}
runAsGroup: {{ int .Values.podSecurity.groupId }}
fsGroup: {{ int .Values.podSecurity.groupId }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "tightfit.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: {{ int .Values.podSecurity.userId }}
runAsGroup: {{ int .Values.podSecurity.groupId }}
privileged: false
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Who runs the pod, and from what it pulls; no pod of ours talks to the Kubernetes API. */}}
{{- define "tightfit.podIdentity" -}}
serviceAccountName: {{ include "tightfit.serviceAccount" . | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "tightfit.podSecurity" . | nindent 2 }}
{{- end -}}

{{/* Where a pod goes; the context is a map with nodeSelector, tolerations, affinity … */}}
{{- define "tightfit.scheduling" -}}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with get $ $key }}
{{ $key }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* The only places that can be written. */}}
{{- define "tightfit.scratchMounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/tightfit
{{- end -}}

{{- define "tightfit.scratchVolumes" -}}
- name: tmp
  emptyDir: {}
- name: home
  emptyDir: {}
{{- end -}}

{{/* Ray's own settings: no reports to its makers, and only who has the token may talk to it. */}}
{{- define "tightfit.rayEnvironment" -}}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: RAY_worker_niceness  # Ray runs its workers at nice 15: other processes of the node would slow every stage
  value: "0"
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN_PATH  # a file: a variable would be in the environment of every process of the pod
  value: /etc/tightfit/ray/token
{{- end -}}

{{- define "tightfit.rayMount" -}}
- name: ray-token
  mountPath: /etc/tightfit/ray
  readOnly: true
{{- end -}}

{{- define "tightfit.rayVolume" -}}
- name: ray-token
  secret:
    secretName: {{ .Values.ray.auth.existingSecret | quote }}
    defaultMode: 0440
    items: [{key: {{ .Values.ray.auth.key | quote }}, path: token}]
{{- end -}}

{{/* A hub's cache is on the models' volume, where there is one (`home`), so that every stage finds what was downloaded. */}}
{{- define "tightfit.hubEnvironment" -}}
- name: HF_HOME
  value: {{ printf "%s/.hub" .home | quote }}
{{- with .root.Values.hub.endpoint }}
- name: HF_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- if .root.Values.hub.existingSecret }}
- name: HF_TOKEN_PATH
  value: /etc/tightfit/hub/token
{{- end }}
{{- end -}}

{{- define "tightfit.hubMount" -}}
{{- if .Values.hub.existingSecret }}
- name: hub-token
  mountPath: /etc/tightfit/hub
  readOnly: true
{{- end }}
{{- end -}}

{{- define "tightfit.hubVolume" -}}
{{- with .Values.hub.existingSecret }}
- name: hub-token
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
    items: [{key: {{ $.Values.hub.key | quote }}, path: token}]
{{- end }}
{{- end -}}

{{/* The volume that checkpoints lie on; `override` is a volume source. */}}
{{- define "tightfit.modelVolume" -}}
- name: models
  {{- if .override }}
  {{- toYaml .override | nindent 2 }}
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ include "tightfit.claim" .root | quote }}
  {{- end }}
{{- end -}}

{{/* Seconds that a gateway takes to end: what its peers wait for. */}}
{{- define "tightfit.gatewayEndSeconds" -}}
{{- add (int .Values.gateway.preStopSeconds) (int .Values.gateway.drainSeconds) 15 -}}
{{- end -}}
