{{/* What the pods have in common. Every helper takes the root context unless it says otherwise. */}}

{{/* Pod Security "restricted", for the pod. */}}
{{- define "select-moe.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Pod Security "restricted", for a container. */}}
{{- define "select-moe.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/*
The labels of a pod. In a Kubeflow with several users the profile's namespace injects Istio's proxy, with which a Job
never ends, and whose init container Pod Security "restricted" refuses.
*/}}
{{- define "select-moe.podLabels" -}}
{{ include "select-moe.labels" . }}
{{- if .root.Values.kfp.multiUser }}
sidecar.istio.io/inject: "false"
{{- end }}
{{- end }}

{{/* Where a pod may run. Takes a mapping with nodeSelector, tolerations, affinity, topologySpreadConstraints, priorityClassName. */}}
{{- define "select-moe.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}
