{{/* Names, labels, images and addresses. Every helper takes the root context unless it says otherwise. */}}

{{- define "select-moe.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* 40 characters at most: the longest suffix has 22, and a name of a Service ends at 63. */}}
{{- define "select-moe.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "select-moe.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "select-moe.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* The labels that select a component's pods. Takes (dict "root" $ "component" NAME). */}}
{{- define "select-moe.selector" -}}
app.kubernetes.io/name: {{ include "select-moe.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* All labels. Takes (dict "root" $ "component" NAME). */}}
{{- define "select-moe.labels" -}}
{{ include "select-moe.selector" . }}
app.kubernetes.io/part-of: select-moe
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The metadata of an object. Takes (dict "root" $ "component" NAME "name" NAME), and "annotations" (a dict) where there are own ones. */}}
{{- define "select-moe.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "select-moe.labels" . | nindent 2 }}
{{- with merge (dict) (.annotations | default dict) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The labels of the pipeline's own pods: not those of the release, whose default-deny is not for them. */}}
{{- define "select-moe.pipelineSelector" -}}
app.kubernetes.io/component: pipeline
app.kubernetes.io/part-of: {{ include "select-moe.fullname" . }}
{{- end }}

{{/* An image by tag, and by digest where there is one. Takes (dict "root" $ "image" VALUES). */}}
{{- define "select-moe.imageOf" -}}
{{- $registry := default .image.registry .root.Values.global.imageRegistry }}
{{- $name := .image.repository }}
{{- with $registry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end }}
{{- $name }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- with .image.digest }}@{{ . }}{{ end }}
{{- end }}

{{- define "select-moe.image" -}}
{{- include "select-moe.imageOf" (dict "root" . "image" .Values.image) }}
{{- end }}

{{- define "select-moe.imagePullSecrets" -}}
{{- with .Values.global.imagePullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* The storage class of a claim. Takes (dict "root" $ "class" NAME); "-" is the empty class: no provisioner. */}}
{{- define "select-moe.storageClass" -}}
{{- with default .root.Values.global.storageClass .class -}}
storageClassName: {{ if eq . "-" }}""{{ else }}{{ . }}{{ end }}
{{- end }}
{{- end }}

{{/* Names that several objects refer to. */}}
{{- define "select-moe.s3Secret" -}}
{{- default (printf "%s-s3" (include "select-moe.fullname" .)) .Values.objectStorage.existingSecret.name }}
{{- end }}

{{- define "select-moe.mlflowAuthSecret" -}}
{{- default (printf "%s-mlflow-auth" (include "select-moe.fullname" .)) .Values.mlflow.auth.existingSecret.name }}
{{- end }}

{{- define "select-moe.profileConfigMap" -}}
{{- printf "%s-profile" (include "select-moe.fullname" .) }}
{{- end }}

{{/* The service account of the pipeline's pods; empty: the one that Kubeflow Pipelines chooses. */}}
{{- define "select-moe.pipelineServiceAccount" -}}
{{- if .Values.pipeline.serviceAccount.create }}
{{- default (printf "%s-pipeline" (include "select-moe.fullname" .)) .Values.pipeline.serviceAccount.name }}
{{- else }}
{{- .Values.pipeline.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Who the hooks, tests and the retention job run as, unless they need rights: an account without any. */}}
{{- define "select-moe.jobsServiceAccount" -}}
{{- printf "%s-jobs" (include "select-moe.fullname" .) }}
{{- end }}

{{/* Addresses. */}}
{{- define "select-moe.mlflowUrl" -}}
{{- if .Values.mlflow.enabled }}
{{- printf "http://%s-mlflow.%s:%d" (include "select-moe.fullname" .) .Release.Namespace (int .Values.mlflow.service.port) }}
{{- else }}
{{- .Values.mlflow.externalUrl | trimSuffix "/" }}
{{- end }}
{{- end }}

{{- define "select-moe.s3Endpoint" -}}
{{- if .Values.objectStorage.seaweedfs.enabled }}
{{- printf "http://%s-seaweedfs.%s:8333" (include "select-moe.fullname" .) .Release.Namespace }}
{{- else }}
{{- .Values.objectStorage.external.endpoint | trimSuffix "/" }}
{{- end }}
{{- end }}

{{/* The port of an address. Takes the address. */}}
{{- define "select-moe.port" -}}
{{- $url := urlParse . }}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" }}
{{- default (ternary "443" "80" (eq $url.scheme "https")) $port }}
{{- end }}

{{/* Host headers that MLflow answers to: the Service's names with and without port, the loopback, Ingress and extra hosts. */}}
{{- define "select-moe.mlflowHosts" -}}
{{- $service := printf "%s-mlflow" (include "select-moe.fullname" .) }}
{{- $namespaced := printf "%s.%s" $service .Release.Namespace }}
{{- $domain := .Values.mlflow.clusterDomain }}
{{- $names := list "localhost" "127.0.0.1" $service $namespaced (printf "%s.svc" $namespaced) (printf "%s.svc.%s" $namespaced $domain) }}
{{- if .Values.mlflow.ingress.enabled }}{{ $names = append $names .Values.mlflow.ingress.host }}{{ end }}
{{- $hosts := list }}
{{- range $names }}{{ $hosts = concat $hosts (list . (printf "%s:*" .)) }}{{ end }}
{{- concat $hosts .Values.mlflow.allowedHosts | uniq | join "," }}
{{- end }}
