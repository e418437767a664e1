{{/* The Secrets that the release makes for itself, in the form that `python -m pipelines.install secrets` reads. */}}
{{- define "select-moe.secretsSpec" -}}
{{- $secrets := list }}
{{- with .Values.objectStorage }}
{{- if and .seaweedfs.enabled (not .existingSecret.name) }}
{{- $identities := dict "access_key" .existingSecret.accessKeyKey "secret_key" .existingSecret.secretKeyKey }}
{{- $keys := dict .existingSecret.accessKeyKey (dict "random" 20) .existingSecret.secretKeyKey (dict "random" 40) .existingSecret.identitiesKey (dict "seaweedfs" $identities) }}
{{- $secrets = append $secrets (dict "component" "seaweedfs" "name" (include "select-moe.s3Secret" $) "keys" $keys) }}
{{- end }}
{{- end }}
{{- with .Values.mlflow }}
{{- if and .enabled .auth.enabled (not .auth.existingSecret.name) }}
{{- $keys := dict .auth.existingSecret.passwordKey (dict "random" 32) .auth.existingSecret.flaskKey (dict "random" 32) }}
{{- $secrets = append $secrets (dict "component" "mlflow" "name" (include "select-moe.mlflowAuthSecret" $) "keys" $keys) }}
{{- end }}
{{- end }}
{{- if $secrets }}
secrets:
  {{- range $secrets }}
  - name: {{ .name }}
    labels:
      {{- include "select-moe.selector" (dict "root" $ "component" .component) | nindent 6 }}
      app.kubernetes.io/part-of: select-moe
    annotations:
      helm.sh/resource-policy: keep
    keys:
      {{- toYaml .keys | nindent 6 }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Whether there is anything to make. */}}
{{- define "select-moe.makesSecrets" -}}
{{- if and .Values.secrets.create (include "select-moe.secretsSpec" . | trim) }}true{{ end }}
{{- end }}

{{/* The annotations of a hook: what has done its work goes; of what failed Helm 4 shows the log, and it stays. Takes (dict "events" EVENTS "weight" NUMBER). */}}
{{- define "select-moe.hook" -}}
helm.sh/hook: {{ .events }}
helm.sh/hook-weight: {{ .weight | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
helm.sh/hook-output-log-policy: hook-failed
{{- end }}

{{/* The metadata of a hook. Takes (dict "root" $ "component" NAME "name" SUFFIX "events" EVENTS "weight" NUMBER). */}}
{{- define "select-moe.hookMetadata" -}}
{{- $annotations := include "select-moe.hook" . | fromYaml }}
{{- $name := printf "%s-%s" (include "select-moe.fullname" .root) .name }}
{{- include "select-moe.metadata" (dict "root" .root "component" .component "name" $name "annotations" $annotations) }}
{{- end }}
