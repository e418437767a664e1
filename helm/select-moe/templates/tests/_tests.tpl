{{/* A pod that `helm test` runs. Takes (dict "root" $ "what" WHAT "pod" POD), POD as taskPodSpec wants it. */}}
{{- define "select-moe.test" -}}
{{- $component := printf "test-%s" .what }}
{{- $hook := dict "root" .root "component" $component "name" $component "events" "test" "weight" "0" }}
apiVersion: v1
kind: Pod
metadata:
  {{- include "select-moe.hookMetadata" $hook | nindent 2 }}
spec:
  activeDeadlineSeconds: {{ .root.Values.hooks.activeDeadlineSeconds }}
  {{- include "select-moe.taskPodSpec" (merge (dict "root" .root "component" $component) .pod) | nindent 2 }}
{{- end }}
