{{/* Pods of this instance, by component, as peers. */}}
{{- define "tightfit.peers" -}}
- podSelector:
    matchLabels:
      {{- include "tightfit.selector" .root | nindent 6 }}
    matchExpressions:
      - key: app.kubernetes.io/component
        operator: In
        values: [{{ join ", " .components }}]
{{- end -}}

{{/* What every pod may ask: names. */}}
{{- define "tightfit.dns" -}}
- to:
    - namespaceSelector: {}
  ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end -}}

{{/* Metadata of a policy for the pods of some components, and its selector. */}}
{{- define "tightfit.policyHead" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "tightfit.fullname" .root }}-{{ .name }}
  labels:
    {{- include "tightfit.labels" .root | nindent 4 }}
spec:
  podSelector:
    matchLabels:
      {{- include "tightfit.selector" .root | nindent 6 }}
    matchExpressions:
      - key: app.kubernetes.io/component
        operator: In
        values: [{{ join ", " .components }}]
{{- end -}}
