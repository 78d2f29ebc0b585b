{{/*
What the schema cannot say: settings that do not go together. Every problem is a line "path: reason", and all are said at once.
*/}}
{{- define "tightfit.problems" -}}
{{- $v := .Values -}}
{{- if not $v.image.repository }}
image.repository: missing; build the image with Dockerfile, push it to a registry of yours and name it here
{{- end }}
{{- if not $v.serve.model }}
serve.model: missing; a directory under {{ $v.models.mountPath }}, or a hub name such as bigscience/bloom
{{- end }}
{{- if not $v.pools }}
pools: empty; name one pool of nodes at least, such as {big: {nodes: 1, devices: {type: a100-80, count: 8}}}
{{- end }}
{{- if not $v.ray.auth.existingSecret }}
ray.auth.existingSecret: missing; whoever reaches Ray can run code on it. kubectl create secret generic tightfit-ray --from-literal=token=$(openssl rand -hex 32)
{{- end }}
{{- include "tightfit.securityProblems" . }}
{{- include "tightfit.poolProblems" . }}
{{- include "tightfit.modelProblems" . }}
{{- end -}}

{{- define "tightfit.securityProblems" -}}
{{- $g := .Values.gateway -}}
{{- if not $g.insecure }}
{{- if not $g.tls.existingSecret }}
gateway.tls.existingSecret: missing; name a secret of type kubernetes.io/tls, or set gateway.insecure behind a proxy that encrypts
{{- end }}
{{- if not (or $g.auth.existingSecret $g.tls.clientCA) }}
gateway.auth.existingSecret: missing; name a secret with what `tightfit token` writes, or set gateway.insecure behind a proxy that authenticates
{{- end }}
{{- end }}
{{- if and $g.tls.clientCA (not $g.tls.existingSecret) }}
gateway.tls.clientCA: needs gateway.tls.existingSecret, whose ca.crt has the authorities
{{- end }}
{{- $patience := add (.Values.serve.placement_timeout_s | ceil | int) (.Values.serve.load_timeout_s | ceil | int) }}
{{- if lt (int $g.startupSeconds) (int $patience) }}
gateway.startupSeconds: {{ int $g.startupSeconds }} is less than serve.placement_timeout_s and serve.load_timeout_s together, {{ $patience }}; the pod would be ended before it could say what it waits for
{{- end }}
{{- with .Values.serve.trace_endpoint }}
{{- $port := regexFind "[0-9]+$" . | int }}
{{- if or (not (regexMatch "^https?://[^[:space:]/]+:[0-9]{1,5}$" .)) (lt $port 1) (gt $port 65535) }}
serve.trace_endpoint: {{ . | quote }} is not http://host:port or https://host:port
{{- end }}
{{- end }}
{{- if and $g.ingress.enabled (not $g.ingress.host) }}
gateway.ingress.host: missing
{{- end }}
{{- if and $g.grpcRoute.enabled (not $g.grpcRoute.parentRefs) }}
gateway.grpcRoute.parentRefs: missing; name the Gateway that the route belongs to
{{- end }}
{{- if ne (len (uniq (list (int $g.port) (int $g.metricsPort) (int $g.healthPort) (int $g.live.port)))) 4 }}
gateway.port, gateway.metricsPort, gateway.healthPort, gateway.live.port: two of them are the same
{{- end }}
{{- end -}}

{{- define "tightfit.poolProblems" -}}
{{- $g := .Values.gateway -}}
{{- $kinds := list -}}
{{- range $name, $pool := .Values.pools }}
{{- $kinds = append $kinds (include "tightfit.kind" (dict "root" $ "type" $pool.devices.type)) }}
{{- if gt (add (len (include "tightfit.fullname" $)) (len $name)) 50 }}
pools.{{ $name }}: the name is too long; with that of the release it may have 50 characters
{{- end }}
{{- end }}
{{- if gt (len (uniq $kinds)) 1 }}
pools: some are of CPUs, some of GPUs; the stages of a replica are all of one kind
{{- end }}
{{- $devices := int (include "tightfit.devices" .) }}
{{- $stages := int (default 0 .Values.serve.stages) }}
{{- $path := "gateway.replicas" }}
{{- $most := int $g.replicas }}
{{- if $g.autoscaling.enabled }}
{{- $path = "gateway.autoscaling.maxReplicas" }}
{{- $most = int $g.autoscaling.maxReplicas }}
{{- if gt (int $g.autoscaling.minReplicas) $most }}
gateway.autoscaling.minReplicas: {{ $g.autoscaling.minReplicas }} is more than maxReplicas, {{ $most }}
{{- end }}
{{- if and (eq $g.autoscaling.kind "keda") (not $g.autoscaling.prometheusAddress) }}
gateway.autoscaling.prometheusAddress: missing; KEDA asks it for the length of the queue
{{- end }}
{{- end }}
{{- if and .Values.pools (gt (mul $most $stages) $devices) }}
{{ $path }}: {{ $most }} × serve.stages, {{ $stages }}, is more than the {{ $devices }} device(s) of all pools
{{- end }}
{{- if and .Values.pools (not $stages) (gt $most $devices) }}
{{ $path }}: {{ $most }} replicas with a device each are more than the {{ $devices }} device(s) of all pools
{{- end }}
{{- end -}}

{{- define "tightfit.modelProblems" -}}
{{- $v := .Values -}}
{{- $model := default "" $v.serve.model -}}
{{- if and (hasPrefix "/" $model) (not (hasPrefix (printf "%s/" $v.models.mountPath) $model)) }}
serve.model: {{ $model }} is not under models.mountPath, {{ $v.models.mountPath }}
{{- end }}
{{- if not (or $v.models.create $v.models.existingClaim) }}
{{- if not $v.gateway.modelVolume }}
gateway.modelVolume: missing; without models.create and models.existingClaim there is no other volume
{{- end }}
{{- range $name, $pool := $v.pools }}
{{- if not $pool.modelVolume }}
pools.{{ $name }}.modelVolume: missing; without models.create and models.existingClaim there is no other volume
{{- end }}
{{- end }}
{{- end }}
{{- if $v.prepare.enabled }}
{{- $quantize := default dict $v.prepare.quantize }}
{{- if not $quantize.model }}
prepare.quantize.model: missing; what is to be quantised
{{- end }}
{{- if not (hasPrefix (printf "%s/" $v.models.mountPath) (default "" $quantize.out)) }}
prepare.quantize.out: {{ default "missing" $quantize.out }}; a directory under models.mountPath, {{ $v.models.mountPath }}
{{- end }}
{{- end }}
{{- $planned := default $model $v.planCheck.model }}
{{- if and $v.planCheck.enabled (hasPrefix "/" $planned) (not $v.models.existingClaim) }}
planCheck.model: {{ $planned }} cannot be read before the chart's own claim is there; give the hub name or the name in configs/models that it was made from, or set planCheck.enabled to false
{{- end }}
{{- end -}}

{{- define "tightfit.validate" -}}
{{- $problems := include "tightfit.problems" . | trim -}}
{{- if $problems -}}
{{- fail (printf "these values cannot be installed:\n%s" $problems) -}}
{{- end -}}
{{- end -}}
