{{/* One pool as a worker group of the RayCluster. */}}
{{- define "tightfit.workerGroup" -}}
{{- $root := .root -}}
{{- $pool := .pool -}}
{{- $defaults := $root.Values.poolDefaults -}}
{{- $devices := int (default 1 $pool.devices.count) -}}
{{- $nodes := int (default 1 $pool.nodes) -}}
{{- $gpus := 0 -}}
{{- if eq "gpu" (include "tightfit.kind" (dict "root" $root "type" $pool.devices.type)) }}{{ $gpus = $devices }}{{ end -}}
- groupName: {{ .name | quote }}
  replicas: {{ $nodes }}
  minReplicas: {{ $nodes }}
  maxReplicas: {{ $nodes }}
  rayStartParams:
    {{- /* KubeRay adds num-cpus, from the container's limit. */}}
    num-gpus: {{ $gpus | quote }}
    node-manager-port: "6380"
    object-store-memory: "83886080"
  template:
    metadata:
      labels:
        {{- include "tightfit.labels" $root | nindent 8 }}
        app.kubernetes.io/component: worker
        tightfit/pool: {{ .name | quote }}
        {{- with $pool.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $pool.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "tightfit.podIdentity" $root | nindent 6 }}
      {{- include "tightfit.scheduling" $pool | nindent 6 }}
      {{- /* Stages live on until their gateway has drained; the node then ends by itself. */}}
      terminationGracePeriodSeconds: {{ add .end 45 }}
      containers:
        - name: ray-worker
          image: {{ include "tightfit.image" $root | quote }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy | quote }}
          ports:
            - name: raylet
              containerPort: 6380
          env:
            {{- include "tightfit.rayEnvironment" $root | nindent 12 }}
            - name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
              value: {{ .end | quote }}
            {{- with $pool.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          resources:
            {{- include "tightfit.workerResources" (dict "pool" $pool "defaults" $defaults "devices" $devices "gpus" $gpus) | nindent 12 }}
          startupProbe:
            tcpSocket: {port: raylet}
            periodSeconds: 5
            failureThreshold: 120
          readinessProbe:
            tcpSocket: {port: raylet}
            periodSeconds: 10
            failureThreshold: 3
          livenessProbe:
            tcpSocket: {port: raylet}
            periodSeconds: 10
            failureThreshold: 12
          securityContext:
            {{- include "tightfit.containerSecurity" $root | nindent 12 }}
          volumeMounts:
            {{- include "tightfit.scratchMounts" $root | nindent 12 }}
            {{- include "tightfit.rayMount" $root | nindent 12 }}
            - name: shm
              mountPath: /dev/shm
            - name: models
              mountPath: {{ $root.Values.models.mountPath | quote }}
              readOnly: true
      volumes:
        {{- include "tightfit.scratchVolumes" $root | nindent 8 }}
        {{- include "tightfit.rayVolume" $root | nindent 8 }}
        - name: shm
          emptyDir:
            medium: Memory
            sizeLimit: {{ default $defaults.shmSize $pool.shmSize | quote }}
        {{- include "tightfit.modelVolume" (dict "root" $root "override" $pool.modelVolume) | nindent 8 }}
{{- end -}}

{{/* The pool's own, or so much per device; GPUs are always those of `devices`. */}}
{{- define "tightfit.workerResources" -}}
{{- $cpu := mul .devices (int .defaults.cpuPerDevice) | toString -}}
{{- $memory := printf "%dGi" (mul .devices (int .defaults.memoryPerDevice)) -}}
{{- $own := default dict .pool.resources -}}
{{- $limits := merge (dict) (default dict $own.limits) (dict "cpu" $cpu "memory" $memory) -}}
{{- $requests := merge (dict) (default dict $own.requests) (pick $limits "cpu" "memory") -}}
{{- if .gpus -}}
{{- $resource := default .defaults.gpuResource .pool.gpuResource -}}
{{- $limits = set $limits $resource .gpus -}}
{{- $requests = set $requests $resource .gpus -}}
{{- end -}}
limits:
  {{- toYaml $limits | nindent 2 }}
requests:
  {{- toYaml $requests | nindent 2 }}
{{- end -}}
