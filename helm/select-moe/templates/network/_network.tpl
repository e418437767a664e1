{{/* The head of a policy. Takes (dict "root" $ "name" SUFFIX "component" NAME). */}}
{{- define "select-moe.policy" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "select-moe.metadata" (dict "root" .root "component" .component "name" (printf "%s-%s" (include "select-moe.fullname" .root) .name)) | nindent 2 }}
{{- end }}

{{/* A selector for several components of the release. Takes (dict "root" $ "components" NAMES), separated by blanks. */}}
{{- define "select-moe.componentsSelector" -}}
matchLabels:
  app.kubernetes.io/name: {{ include "select-moe.name" .root }}
  app.kubernetes.io/instance: {{ .root.Release.Name }}
matchExpressions:
  - key: app.kubernetes.io/component
    operator: In
    values:
      {{- splitList " " .components | toYaml | nindent 6 }}
{{- end }}

{{/* The pipeline's pods, as a peer. */}}
{{- define "select-moe.pipelinePeer" -}}
- podSelector:
    matchLabels:
      {{- include "select-moe.pipelineSelector" . | nindent 6 }}
{{- end }}

{{/* A way out. Takes (dict "to" PEERS "ports" LIST); no peers: to anywhere. */}}
{{- define "select-moe.egress" -}}
- ports:
    {{- range .ports }}
    - port: {{ int . }}
      protocol: TCP
    {{- end }}
  {{- with .to }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
